"""Read the reference numbers of ``tests/golden``; its README says where they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from drawn_weights import draw
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded case: what the JSON says and the tensors beside it."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with ``prefix.``, without the prefix."""
        start = prefix + "."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def load_case(name: str) -> Case:
    """Load ``tests/golden/<name>.json`` and, where they are, its weights as drawn and tensors."""
    path = GOLDEN / name
    meta = json.loads(path.with_name(path.name + ".json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    if (drawn := path.with_name(path.name + ".drawn.json")).exists():
        for recipe in json.loads(drawn.read_text()):
            tensors |= draw(recipe)
    if (stored := path.with_name(path.name + ".safetensors")).exists():
        tensors |= load_file(str(stored))
    return Case(meta, tensors)
