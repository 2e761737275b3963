"""Time one stage-2 training step on every backend, and the share of it spent waiting for data.

    python benchmarks/train_step.py [--scale digits|S] [--backends torch,...] [key=value ...]

Each backend runs ``rae-xla train stage2`` in a process of its own on the same shards; the
numbers are those that the run logs (``perf/step_time``, ``perf/data_wait``), without its first
step, which compiles. Ratios are relative to the first backend.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from world import BACKENDS, SCALES, make_world, rae_xla


def main() -> None:
    """Run every backend and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="digits")
    parser.add_argument(
        "--backends", default=";".join(BACKENDS), help="names, separated by semicolons"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    scale, first = SCALES[args.scale], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_world(folder, scale, images=4 * scale.batch)
        print(f"{'backend':<16}{'ms/step':>10}{'images/s':>10}{'data wait':>11}{'ratio':>8}")
        for number, backend in enumerate(args.backends.split(";")):
            results = folder / str(number)
            rae_xla(
                "train", "stage2", "--config", config, "--results-dir", results,
                f"training.steps={args.steps}", "training.log_every=10",
                f"checkpoint.every_steps={args.steps}", *BACKENDS[backend], *args.overrides,
            )  # fmt: skip
            lines = [json.loads(x) for x in (results / "metrics.jsonl").read_text().splitlines()]
            timed = lines[1:]  # the first window warms caches up
            seconds = statistics.median(line["perf/step_time"] for line in timed)
            wait = statistics.mean(line["perf/data_wait"] for line in timed)
            first = first or seconds
            print(
                f"{backend:<16}{1e3 * seconds:>10.1f}{scale.batch / seconds:>10.1f}"
                f"{100 * wait:>10.1f}%{seconds / first:>8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
