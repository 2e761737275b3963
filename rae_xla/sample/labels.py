"""Which class every picture of a set is meant to show."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_xla.errors import UserError


def make_labels(spec: str, count: int, num_classes: int, seed: int) -> Tensor:
    """Labels (count,) int64 of a sample set.

    Args:
        spec: ``equal`` (every class equally often, in order), ``random`` (drawn from ``seed``), or
            class numbers such as ``207,360``, repeated in turn.
        count: how many pictures.
        num_classes: labels are below it.
        seed: of ``random``.

    Raises:
        UserError: an unknown word, a label out of range, or a count that classes do not divide.
    """
    if spec == "equal":
        if count % num_classes:
            near = max(1, round(count / num_classes)) * num_classes
            raise UserError(
                f"--labels equal: {count} pictures cannot be shared equally by {num_classes} "
                f"classes; ask for {near}, or --labels random"
            )
        return torch.arange(num_classes).repeat_interleave(count // num_classes)
    if spec == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(num_classes, (count,), generator=generator)
    try:
        named = [int(word) for word in spec.split(",")]
    except ValueError:
        raise UserError(
            f"--labels {spec}: say equal, random, or class numbers such as 207,360"
        ) from None
    wrong = [label for label in named if not 0 <= label < num_classes]
    if wrong:
        raise UserError(
            f"--labels: {wrong[0]} is out of range; the model knows classes 0 to {num_classes - 1}"
        )
    return torch.tensor(named).repeat(-(-count // len(named)))[:count]
