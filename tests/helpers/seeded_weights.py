"""Random weights stored as the seed that generates them.

A group of tensors is stored as a recipe: a seed, and for every tensor, in the order of generation,
its shape, scale, fan and mean; the tensor is ``normal * scale / sqrt(fan) + mean``. ``collect.py``
only writes recipes that reproduce the recorded weights bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

# Spreads of the reference weights: scale, and whether it is divided by sqrt(fan in).
SPREADS = [(1.0, True), (0.05, False), (0.1, False), (0.2, False), (0.3, False), (1.0, False)]
MEANS = (0.0, 1.0)


def draw(recipe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a recipe.

    Raises:
        AssertionError: If this version of torch generates other numbers.
    """
    tensors = _drawn(recipe)
    assert math.isclose(_size(tensors), recipe["size"], rel_tol=1e-6), (
        "the generator of torch gives other numbers than when the golden weights were recorded: "
        "collect them with an empty DRAWN (tests/golden/collect.py)"
    )
    return tensors


def find_recipe(tensors: Mapping[str, torch.Tensor], seed: int) -> dict[str, Any]:
    """Return the recipe of tensors that were generated in this order.

    A tensor that the recipe does not reproduce still takes its place in the sequence; the caller
    compares the tensors and stores such ones separately.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name, tensor in tensors.items():
        normal = torch.randn(tensor.shape, generator=generator)
        entries[name] = [list(tensor.shape), *_spread(tensor, normal)]
    recipe = {"seed": seed, "tensors": entries}
    return recipe | {"size": _size(_drawn(recipe))}


def _drawn(recipe: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(recipe["seed"])
    return {
        name: torch.randn(shape, generator=generator) * scale / math.sqrt(fan) + mean
        for name, (shape, scale, fan, mean) in recipe["tensors"].items()
    }


def _spread(tensor: torch.Tensor, normal: torch.Tensor) -> tuple[float, int, float]:
    for scale, over_fan in SPREADS:
        fan = tensor[0].numel() if over_fan else 1
        for mean in MEANS:
            if torch.equal(tensor, normal * scale / math.sqrt(fan) + mean):
                return scale, fan, mean
    return 1.0, 1, 0.0


def _size(tensors: Mapping[str, torch.Tensor]) -> float:
    return sum(tensor.abs().sum(dtype=torch.float64).item() for tensor in tensors.values())
