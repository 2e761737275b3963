"""What the two stages have in common: the loop asks this of a stage, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from rae_xla.train.step import LossFn

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One stage of one run, built on the CPU.

    Attributes:
        name: ``stage1`` or ``stage2``, for people.
        model: what is trained.
        frozen: a module the losses use besides; it may contain ``model``.
        losses: per-sample losses of a batch, by ``model``.
        publish: from a state dict of ``model`` to the one the published checkpoints hold.
        unpublish: the way back.
        preview: from the averaged model to a picture, (H, W, 3) uint8, for people to look at.
    """

    name: str
    model: nn.Module
    frozen: nn.Module
    losses: LossFn
    publish: Callable[[StateDict], dict[str, Tensor]]
    unpublish: Callable[[StateDict], dict[str, Tensor]]
    preview: Callable[[nn.Module], np.ndarray]
