"""Read the reference numbers of ``tests/golden``; its README documents their origin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from seeded_weights import draw

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded case: the content of its JSON file, and its tensors."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors whose names start with ``prefix.``, without the prefix."""
        start = prefix + "."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def load_case(name: str) -> Case:
    """Load ``tests/golden/<name>.json`` and, if they exist, its seeded and its stored tensors."""
    path = GOLDEN / name
    meta = json.loads(path.with_name(path.name + ".json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    if (drawn := path.with_name(path.name + ".drawn.json")).exists():
        for recipe in json.loads(drawn.read_text()):
            tensors |= draw(recipe)
    if (stored := path.with_name(path.name + ".safetensors")).exists():
        tensors |= load_file(str(stored))
    return Case(meta, tensors)
