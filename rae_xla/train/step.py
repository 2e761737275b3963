"""One optimizer step as one function of a batch: the function that is compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rae_xla.runtime import Batch
from rae_xla.runtime.random import Draws
from rae_xla.train.adamw import AdamW
from rae_xla.train.state import MOMENTS, TrainState, update_ema

LossFn = Callable[[Batch, Draws], Tensor]
"""Per-sample losses (rows,) of a batch, given the draws of its rows."""

METRICS = ("train/loss", "train/grad_norm")
"""What the vector returned by a train step holds."""


def make_train_step(
    loss_fn: LossFn,
    state: TrainState,
    optimizer: AdamW,
    *,
    seed: int,
    ema_decay: float,
    clip_grad: float | None,
    accumulate: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Callable[[Batch], Tensor]:
    """Build the step: draws, forward, loss, backward, clip, AdamW, EMA.

    Args:
        loss_fn: per-sample losses of a batch.
        state: what the step updates in place.
        optimizer: how.
        seed: of the run; with the step and the row it determines every draw.
        ema_decay: of the moving average.
        clip_grad: largest L2 norm of the whole gradient; None or 0 leaves it as it is.
        accumulate: parts the batch is worked through in. The gradient is the mean over the whole
            batch, so the result is that of one part up to rounding.
        autocast: the precision context of forward and loss.

    Returns:
        ``step(batch) -> metrics``; the batch carries, beside its data, ``row`` (rows,) int32,
        ``step`` 0-d int32 and ``lr`` 0-d float32; metrics is a vector, see ``METRICS``.
    """
    trained = state.trained()
    parameters: list[Tensor] = list(trained.values())
    first, second = ([state.moments[m][name] for name in trained] for m in MOMENTS)

    def step(batch: Batch) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        total = torch.zeros((), device=batch["row"].device)
        for part in split_batch(batch, accumulate):
            with autocast():
                losses = loss_fn(part, Draws(seed, part["step"], part["row"]))
            loss = losses.float().mean() / accumulate
            loss.backward()
            total = total + loss.detach()
        gradients = [_gradient(parameter) for parameter in parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        optimizer.update(parameters, gradients, first, second, batch["lr"], batch["step"])
        update_ema(state.ema, state.model, ema_decay)
        return torch.stack([total, norm.detach()])

    return step


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into equal parts, every ``parts``-th row to the same one.

    Rows next to each other live on the same device, so with this split every device keeps an equal
    share of every part and nothing moves.
    """
    if parts == 1:
        return [batch]
    return [
        {
            name: t.reshape(-1, parts, *t.shape[1:])[:, i] if t.dim() else t
            for name, t in batch.items()
        }
        for i in range(parts)
    ]
