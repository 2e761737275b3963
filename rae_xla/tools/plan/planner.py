"""Forecasts of a run on several topologies: count, trace and compile, in the required processes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rae_xla.config import RunConfig
from rae_xla.tools.plan.arithmetic import count_model
from rae_xla.tools.plan.compile import CompileJob, CompileResult, why_no_compiler
from rae_xla.tools.plan.compiled_step import CompiledStep, analyse_step
from rae_xla.tools.plan.forecast import IMAGENET_IMAGES, Case, Forecast, make_case, make_forecast
from rae_xla.tools.plan.host import HostJob, HostTime
from rae_xla.tools.plan.networks import without_weights
from rae_xla.tools.plan.tpus import Topology
from rae_xla.tools.plan.trace import TraceJob
from rae_xla.tools.plan.worker import Limits, WorkerError, run_module

logger = logging.getLogger(__name__)

_LOG_INTERVAL = 30.0
"""Seconds between two log lines of a process that is running."""


@dataclass(frozen=True)
class PlanRequest:
    """The run to plan, and how.

    Attributes:
        config: of the run.
        task: key of ``rae_xla.train.tasks.TASKS``.
        effort: of the compiler, ``full`` or ``fast``.
        images: images per epoch.
        price: of one chip for one hour, if known.
        limits: of the processes that trace and compile.
        compile_step: whether to compile.
    """

    config: RunConfig
    task: str
    effort: str = "fast"
    images: int = IMAGENET_IMAGES
    price: float | None = None
    limits: Limits = field(default_factory=lambda: Limits(math.inf, math.inf))
    compile_step: bool = True


def make_forecasts(
    request: PlanRequest, topologies: Sequence[Topology], batches: Iterable[int | None]
) -> Iterator[Forecast]:
    """Yield a forecast for each topology with each batch size, as soon as it is finished.

    Args:
        request: the run to plan.
        topologies: TPU slices.
        batches: images per step; None for the configured number.

    Raises:
        UserError: if the configuration is invalid, or does not fit a topology.
    """
    no_compiler = why_no_compiler() if request.compile_step else "compilation was not requested"
    with TemporaryDirectory(prefix="rae-xla-plan-") as name:
        folder = Path(name)
        config, notes = without_weights(request.config, folder / "encoder")
        cases = [make_case(config, topology, b) for b in batches for topology in topologies]
        logger.info("plan: counting parameters and FLOPs")
        counts = count_model(config, request.task)
        compiler = _Compiler(request, folder)
        for case in cases:
            step, host, not_compiled = None, None, no_compiler or ""
            if no_compiler is None:
                try:
                    host = compiler.host_time(case)
                    step = compiler.compile(case)
                    not_compiled = step.result.failure
                except WorkerError as error:
                    not_compiled = str(error)
            yield make_forecast(
                case, counts, step, host=host, not_compiled=not_compiled,
                images=request.images, price=request.price, notes=notes,
            )  # fmt: skip


@dataclass
class _Compiler:
    """Traces and compiles steps; topologies of the same size share a traced step."""

    request: PlanRequest
    folder: Path
    traced: dict[tuple[int, int, int], Path] = field(default_factory=dict)
    replayed: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def compile(self, case: Case) -> CompiledStep:
        traced = self._trace(case)
        out = self.folder / "compiled"
        job = CompileJob(str(traced), str(case.topology), self.request.effort, str(out))
        self._run("compile", job, out, f"compiling for {case.topology}, {case.batch} images")
        return analyse_step(
            CompileResult(**_read(out)),
            _read(traced),
            out.with_suffix(".hlo"),
            chips=case.topology.chips,
            rows=case.batch // case.mesh.batch_shards,
            bf16=case.config.runtime.precision == "bf16",
        )

    def host_time(self, case: Case) -> HostTime:
        """Measure what the host needs for a step, traced and replayed."""
        traced = _read(self._trace(case))
        donated = sum(argument["donated"] for argument in traced["arguments"])
        chips = min(case.topology.chips_per_host, case.topology.chips)
        key = len(traced["arguments"]), donated, chips
        if key not in self.replayed:
            out = self.folder / f"host-{len(self.replayed)}"
            self._run("host", HostJob(*key, str(out)), out, "measuring the host time of a replay")
            self.replayed[key] = _read(out)["seconds"]
        return HostTime(traced["host_seconds"], self.replayed[key])

    def _trace(self, case: Case) -> Path:
        key = case.topology.chips, case.topology.slices, case.batch
        if key not in self.traced:
            out = self.folder / f"step-{len(self.traced)}"
            config_file = out.with_suffix(".yaml")
            case.config.save(config_file)
            job = TraceJob(str(config_file), self.request.task, *key, str(out))
            self._run("trace", job, out, f"tracing the step: {key[0]} chips, {case.batch} images")
            self.traced[key] = out
        return self.traced[key]

    def _run(self, module: str, job: Any, out: Path, activity: str) -> None:
        path = out.with_suffix(".job")
        path.write_text(json.dumps(asdict(job)))
        logger.info("plan: %s", activity)
        last_logged = 0.0

        def log_progress(seconds: float, memory: float) -> None:
            nonlocal last_logged
            if seconds >= last_logged + _LOG_INTERVAL:
                last_logged = seconds
                logger.info("plan: %s: %.0f s, %.1f GB", activity, seconds, memory / 1e9)

        environment = {"PJRT_DEVICE": "CPU"}
        module = f"rae_xla.tools.plan.{module}"
        run_module(module, str(path), self.request.limits, environment, log_progress)


def _read(out: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(out.with_suffix(".json").read_text())
    return content
