"""Make the plan of a run: count, trace, compile, each in the process it needs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rae_xla.config import RunConfig
from rae_xla.plan.arithmetic import count_arithmetic
from rae_xla.plan.chips import Topology
from rae_xla.plan.compile import Compiled, Job
from rae_xla.plan.facts import Facts, read_facts
from rae_xla.plan.forecast import IMAGENET, Case, Forecast, assess, make_case
from rae_xla.plan.networks import without_weights
from rae_xla.plan.trace import TraceJob
from rae_xla.plan.versions import why_no_compiler
from rae_xla.plan.worker import Limits, WorkerError, run_module

Say = Callable[[str], None]
_BEAT = 30.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        config: of the run.
        stage: ``stage1`` or ``stage2``.
        effort: of the compiler, ``full`` or ``fast``.
        images: of the training data.
        price: of one chip for one hour, if known.
        limits: of the processes that trace and compile.
        compile_step: whether to compile at all.
    """

    config: RunConfig
    stage: str
    effort: str = "fast"
    images: int = IMAGENET
    price: float | None = None
    limits: Limits = field(default_factory=lambda: Limits(math.inf, math.inf))
    compile_step: bool = True


def make_plans(
    request: Request, topologies: Sequence[Topology], batches: Iterable[int | None], say: Say
) -> Iterator[Forecast]:
    """Plan a run on each topology with each batch size; each as soon as it is made.

    Args:
        request: the run.
        topologies: TPU slices.
        batches: images of a step; None for the configured number.
        say: takes a line of progress.

    Raises:
        UserError: the configuration cannot be run like this, or a name in it is wrong.
    """
    reason = why_no_compiler() if request.compile_step else "it was not asked for"
    with TemporaryDirectory(prefix="rae-xla-plan-") as name:
        folder = Path(name)
        config, notes = without_weights(request.config, folder / "encoder")
        cases = [make_case(config, topology, b) for b in batches for topology in topologies]
        say("counting parameters and FLOPs")
        arithmetic = count_arithmetic(config, request.stage)
        compiler = _Compiler(request, folder, say)
        for case in cases:
            facts, why = None, reason or ""
            if reason is None:
                try:
                    facts = compiler.compile(case)
                    why = facts.compiled.failure
                except WorkerError as error:
                    why = str(error)
            yield assess(
                case, arithmetic, facts,
                reason=why, images=request.images, price=request.price, notes=notes,
            )  # fmt: skip


@dataclass
class _Compiler:
    """Traces and compiles; topologies with as many chips share a traced step."""

    request: Request
    folder: Path
    say: Say
    traced: dict[tuple[int, int, int], Path] = field(default_factory=dict)

    def compile(self, case: Case) -> Facts:
        step = self._trace(case)
        out = self.folder / "compiled"
        job = Job(str(step), str(case.topology), self.request.effort, str(out))
        self._run("compile", job, out, f"compiling for {case.topology}, {case.batch} images")
        return read_facts(
            Compiled(**_read(out)),
            _read(step),
            out.with_suffix(".hlo"),
            chips=case.topology.chips,
            rows=case.batch // case.mesh.batch_parts,
            bf16=case.config.runtime.precision == "bf16",
        )

    def _trace(self, case: Case) -> Path:
        key = case.topology.chips, case.topology.slices, case.batch
        if key not in self.traced:
            out = self.folder / f"step-{len(self.traced)}"
            saved = out.with_suffix(".yaml")
            case.config.save(saved)
            job = TraceJob(str(saved), self.request.stage, *key, str(out))
            self._run("trace", job, out, f"tracing the step: {key[0]} chips, {case.batch} images")
            self.traced[key] = out
        return self.traced[key]

    def _run(self, module: str, job: Any, out: Path, what: str) -> None:
        path = out.with_suffix(".job")
        path.write_text(json.dumps(asdict(job)))
        self.say(what)
        spoken = 0.0

        def progress(seconds: float, memory: float) -> None:
            nonlocal spoken
            if seconds >= spoken + _BEAT:
                spoken = seconds
                self.say(f"{what}: {seconds:.0f} s, {memory / 1e9:.1f} GB")

        environment = {"PJRT_DEVICE": "CPU"}
        module = f"rae_xla.plan.{module}"
        run_module(module, str(path), self.request.limits, environment, progress)


def _read(out: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return content
