"""Runs of text-to-image training in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rae_xla.checkpoint.manager import list_checkpoints
from rae_xla.checkpoint.tensors import read_parts
from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.runtime import start
from rae_xla.train.trainer import train


class Runs:
    """Runs of one configuration, with their results folders in one folder."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config

    def train(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """Train a run and return its metrics."""
        config = load_config(self.config, overrides=overrides)
        data = open_training_data(config.data.train, config.data.weights)
        backend = start(config.runtime, config.mesh, seed=config.training.global_seed)
        train(config, backend, data, "t2i", self.folder / name)
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def checkpoint(self, name: str, part: str = "model") -> dict[str, torch.Tensor]:
        """Return a part of the last checkpoint of a run."""
        newest = list_checkpoints(str(self.folder / name / "checkpoints"))[-1]
        return dict(read_parts(newest, [part])[part])
