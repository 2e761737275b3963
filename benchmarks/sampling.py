"""Time sampling per image on every backend, with and without guidance.

    python benchmarks/sampling.py [--scale digits|S] [--num-samples N] [key=value ...]

A run of two batches less a run of one gives the time of a batch: start-up and compilation are in
both and cancel. Ratios are to the first row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from world import BACKENDS, SCALES, make_world, rae_xla


def main() -> None:
    """Run, gather, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="digits")
    parser.add_argument("--backends", default=";".join(BACKENDS), help="names, between semicolons")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    first = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_world(folder, SCALES[args.scale], images=SCALES[args.scale].batch)
        rae_xla(
            "train", "stage2", "--config", config, "--results-dir", folder / "run",
            "training.steps=1", "runtime.backend=torch", *args.overrides,
        )  # fmt: skip
        print(f"{'backend':<16}{'guidance':>9}{'ms/image':>10}{'ratio':>8}")
        for backend in args.backends.split(";"):
            for scale in (1.0, 1.5):
                seconds = []
                for batches in (1, 3):
                    start = time.perf_counter()
                    rae_xla(
                        "sample", "--config", config, "--ckpt", folder / "run",
                        "--out", folder / f"{backend}-{scale}-{batches}", "--labels", "random",
                        "--num-samples", batches * args.batch_size,
                        "--batch-size", args.batch_size,
                        f"guidance.scale={scale}", *BACKENDS[backend], *args.overrides,
                    )  # fmt: skip
                    seconds.append(time.perf_counter() - start)
                each = (seconds[1] - seconds[0]) / (2 * args.batch_size)
                first = first or each
                print(f"{backend:<16}{scale:>9}{1e3 * each:>10.2f}{each / first:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
