"""Section ``resume``: a training that saves, loses its last checkpoint, and is resumed.

The repeated steps must have the same losses as the first time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from rae_xla.checkpoint.manager import list_checkpoints
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.tools.first_run.settings import FirstRun

STEPS, EVERY = 8, 4
SIDE, IMAGES, CLASSES = 64, 128, 1000
BATCH = 64

_OUTPUT = 2000  # characters of a failed command to keep


def save_and_resume(run: FirstRun, command: list[str]) -> dict[str, Any]:
    """Train, remove the last checkpoint, train again, and compare.

    Args:
        run: the first run.
        command: that starts ``rae-xla`` on all devices.

    Raises:
        RuntimeError: a training failed.
    """
    folder = Path(run.folder) / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    shards = folder / "shards"
    write_noise(shards)
    results = folder / "results"
    arguments = [
        *command, "train", "stage2", "--config", str(run.tiny_model), "--results-dir", str(results),
        "--data", str(shards), "data.image_size=64", f"training.steps={STEPS}",
        f"training.global_batch_size={BATCH}", "training.log_every=1", "training.sample_every=0",
        f"checkpoint.every_steps={EVERY}", *run.runtime,
    ]  # fmt: skip
    _run(arguments)
    before = losses(results)
    checkpoints = list_checkpoints(str(results / "checkpoints"))
    last = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    shutil.rmtree(results / "checkpoints" / f"step-{last.step:08d}")
    _run(arguments)
    after = losses(results)
    repeated = range(STEPS - EVERY + 1, STEPS + 1)
    difference = max(abs(after[step] - before[step]) / abs(before[step]) for step in repeated)
    return {
        "checkpoints": [checkpoint.step for checkpoint in checkpoints],
        "losses": [before[step] for step in sorted(before)],
        "largest_relative_difference": difference,
        "same_bits": difference == 0.0,
        "passed": difference < 1e-4,  # kernels of CUDA add in no fixed order
    }


def write_noise(shards: Path) -> None:
    """Write shards of random images."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    write_shards(array_source(images, np.arange(IMAGES) % CLASSES), str(shards))


def losses(results: Path) -> dict[int, float]:
    """Return the loss of every step, the last one logged of each."""
    lines = (results / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = (done.stdout + done.stderr)[-_OUTPUT:]
        raise RuntimeError(f"exit status {done.returncode} of {' '.join(arguments)}:\n{output}")
