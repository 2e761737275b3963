"""Measure how long a person waits for each command: its help, its first image, its first step.

    OMP_NUM_THREADS=1 python benchmarks/latency.py [--case NAME ...] [--backends torch xla]
        [--rounds 5] [--against CHECKOUT]

Every command runs in a process of its own on a tiny model, so that little else than its start
counts, up to its first image or step. The processor time is that of all threads. The parts are
disjoint: what is imported while a model is loaded counts as import. With ``--against`` another
checkout of the project takes turns with this one.
"""

from __future__ import annotations

import argparse
import builtins
import compileall
import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("imports", "configuration", "backend", "model", "first", "other")
PART_OF = {
    "rae_xla.config.load": {"load_config": "configuration"},
    "rae_xla.runtime": {"start": "backend"},
    "rae_xla.sample.model_lookup": {"ResolvedModel.load": "model"},
    "rae_xla.sample.pipeline": {"Pipeline.generate": "first"},
    "rae_xla.train.trainer": {"Trainer.__init__": "model", "Trainer.train_step": "first"},
    "rae_xla.interop.instantiate": {"instantiate": "model"},
    "rae_xla.evaluate.reconstruction": {"evaluate_reconstruction": "first"},
}
"""Module -> function -> the part of a command that it is."""
BACKENDS = {
    "torch": ["runtime.backend=torch"],
    "xla": ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"],
}


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        arguments: of ``rae-xla``; ``{files}`` is the folder of the tiny model and its data,
            ``{out}`` an empty one.
        prepared: arguments of a command that runs first and is not measured.
        uses_backend: whether it computes anything.
    """

    arguments: str
    prepared: str = ""
    uses_backend: bool = True


TRAIN = (
    "train stage2 --config {files}/config.yaml --data {files}/shards --results-dir {out}/run "
    "training.global_batch_size=8 training.sample_every=0 training.steps="
)
CASES = {
    "help": Case("--help", uses_backend=False),
    "generate": Case(
        "generate --model {files}/config.yaml --num-samples 1 --num-steps 2 --out {out}/images"
    ),
    "train": Case(TRAIN + "1"),
    "restart": Case(TRAIN + "2", prepared=TRAIN + "1"),
    "evaluate": Case(
        "evaluate recon --config {files}/config.yaml --data {files}/shards --num-images 8 "
        "--batch-size 8 --metrics psnr"
    ),
}


class PartTimer:
    """Divides the processor time of this process into disjoint parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        # The start of Python, and what this file imports, count as imports.
        self._stack, self._since = ["imports"], 0.0
        self.finished = False

    def _charge(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the time inside the context to a part, unless an inner one takes it."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def started(self) -> None:
        """End the imports that precede the command."""
        self._charge()
        self._stack = ["other"]

    def finish(self) -> None:
        """Write the times to a file, if this is the first call."""
        if not self.finished:
            self.finished = True
            self._charge()
            wall = time.time() - float(os.environ["LATENCY_BEGIN"])
            report = {"wall": wall, "processor": time.process_time(), **self.seconds}
            Path(os.environ["LATENCY_REPORT"]).write_text(json.dumps(report))


def watch(timer: PartTimer) -> None:
    """Time all imports, and the functions of ``PART_OF`` once their modules are imported."""
    original, depth, wrapped = builtins.__import__, 0, set()

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with timer.part(part):
                result = function(*args, **kwargs)
                if part == "first" and hasattr(args[0], "train_step"):
                    args[0].run.backend.synchronize()  # the step is only dispatched
            if part == "first":
                timer.finish()
            return result

        return call

    def wrap(module: str) -> None:
        for name, part in PART_OF[module].items():
            owner: Any = sys.modules[module]
            *path, last = name.split(".")
            owner = functools.reduce(lambda of, key: getattr(of, key, None), path, owner)
            if hasattr(owner, last) and (module, name) not in wrapped:  # else half imported
                wrapped.add((module, name))
                setattr(owner, last, timed(getattr(owner, last), part))

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        try:
            if depth > 1:
                return original(name, *args, **kwargs)
            with timer.part("imports"):
                return original(name, *args, **kwargs)
        finally:
            depth -= 1
            if name in PART_OF and name in sys.modules:
                wrap(name)

    builtins.__import__ = importing


def run_command(arguments: list[str]) -> int:
    """Run ``rae-xla`` in this process and report its times."""
    timer = PartTimer()
    main = importlib.import_module("rae_xla.cli.main").main
    timer.started()
    watch(timer)
    try:
        return int(main(arguments))
    finally:
        timer.finish()


def measure(case: Case, checkout: Path, files: Path, overrides: list[str]) -> dict[str, float]:
    """Run a command in a process of its own and return its times."""
    out = Path(tempfile.mkdtemp(dir=files))
    report = out / "report.json"
    for command in filter(None, (case.prepared, case.arguments)):
        arguments = [word.format(files=files, out=out) for word in command.split()]
        done = subprocess.run(
            [sys.executable, __file__, "--in-process", *arguments, *overrides],
            capture_output=True,
            text=True,
            env=os.environ
            | {"PYTHONPATH": str(checkout), "LATENCY_REPORT": str(report)}
            | {"LATENCY_BEGIN": str(time.time())},
        )
        if done.returncode:
            sys.exit(f"rae-xla {' '.join(arguments)}\n{done.stderr}")
    times: dict[str, float] = json.loads(report.read_text())
    shutil.rmtree(out)
    return times


def make_files(folder: Path) -> None:
    """Write a tiny model and shards of random images."""
    import numpy as np

    from rae_xla.data.shards.sources import array_source
    from rae_xla.data.shards.writer import write_shards
    from rae_xla.sample.tiny_model import write_tiny_model

    write_tiny_model(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    write_shards(array_source(pixels, np.arange(64) % 10), str(folder / "shards"))


def table_row(title: str, rounds: list[dict[str, float]]) -> str:
    """Format the medians, and the range of the totals in brackets."""
    cells = []
    for name in ("wall", "processor", *PARTS):
        values = [times.get(name, 0.0) for times in rounds]
        spread = f" ({min(values):.2f} to {max(values):.2f})"
        cells.append(f"{statistics.median(values):.2f}" + spread * (name not in PARTS))
    return " | ".join([f"| {title}", *cells]) + " |"


def main() -> None:
    """Measure the cases, checkouts in turn, and print a table in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    args = parser.parse_args()
    checkouts = {"this": ROOT} | ({"other": args.against} if args.against else {})
    for checkout in checkouts.values():  # once, as an installation does
        compileall.compile_dir(checkout / "rae_xla", quiet=1)
    print("| " + " | ".join(["command", "wall", "processor", *PARTS]) + " |")
    print("|---" * (3 + len(PARTS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name))
        for case in args.case:
            for backend in args.backends if CASES[case].uses_backend else ["none"]:
                overrides = BACKENDS.get(backend, [])
                found: dict[str, list[dict[str, float]]] = {which: [] for which in checkouts}
                for _ in range(args.rounds):
                    for which, checkout in checkouts.items():
                        times = measure(CASES[case], checkout, Path(name), overrides)
                        found[which].append(times)
                for which, rounds in found.items():
                    print(table_row(f"{case}, {backend}, {which}", rounds), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-process"]:
        sys.exit(run_command(sys.argv[2:]))
    main()
