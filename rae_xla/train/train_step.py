"""The train step: one optimizer step as one function of a batch, which a backend compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rae_xla.checkpoint.train_state import TrainedModule, TrainState
from rae_xla.ops.random import CounterRNG
from rae_xla.ops.updates import AdamWScalars
from rae_xla.runtime import Backend, Batch
from rae_xla.train.ema import update_ema, update_power_averages
from rae_xla.train.muon import Muon
from rae_xla.train.optimizers import AdamW

LossFn = Callable[[Batch, CounterRNG], Tensor]
"""Losses (B,) of the samples of a batch, given their random numbers."""


@dataclass
class TrainStep:
    """A function of a batch that updates the train state and returns its metrics as one vector.

    One vector, so that the metrics of a step are copied to the host at once. The batch carries,
    besides its data, ``row`` (B,) int32, the position of each sample in the global batch, ``step``
    0-d int32, ``lr`` 0-d float32, and the other scalars of ``Task.inputs``.

    Attributes:
        fn: updates the state; returns metrics by name as 0-d tensors.
        metric_names: the names of the vector's elements, known once the step has been traced.
    """

    fn: Callable[[Batch], Mapping[str, Tensor]]
    metric_names: tuple[str, ...] = field(default=(), init=False)

    def __call__(self, batch: Batch) -> Tensor:
        """Run the step; returns its metrics, (M,) float32."""
        metrics = self.fn(batch)
        self.metric_names = tuple(metrics)
        return torch.stack([value.detach().float() for value in metrics.values()])


def make_train_step(
    loss_fn: LossFn,
    state: TrainState,
    optimizer: AdamW | Muon,
    *,
    seed: int,
    ema_decay: float,
    clip_grad: float | None,
    accumulate: int,
    backend: Backend,
    skip_norm: float | None = None,
) -> TrainStep:
    """Build a step: random draws, forward, loss, backward, clipping, AdamW, EMA.

    Args:
        loss_fn: returns the losses of a batch's samples.
        state: updated in place.
        optimizer: updates the parameters.
        seed: of the run. Every random number is a function of it, the step and the row.
        ema_decay: of the moving average.
        clip_grad: largest L2 norm of the whole gradient; None or 0 disables clipping.
        accumulate: number of micro-batches that the batch is split into. The gradient is the mean
            over the global batch, so the result is that of one batch up to rounding.
        backend: holds the state.
        skip_norm: the update is skipped if the gradient's L2 norm is larger; None disables this.
    """

    def step(batch: Batch) -> dict[str, Tensor]:
        clear_gradients(state.model)
        total = torch.zeros((), device=batch["row"].device)
        for micro_batch in split_micro_batches(batch, accumulate):
            with backend.autocast():
                losses = loss_fn(
                    micro_batch, CounterRNG(seed, micro_batch["step"], micro_batch["row"])
                )
            loss = losses.float().mean() / accumulate
            loss.backward()
            total = total + loss.detach()
        [total] = backend.global_mean([total])
        norm, skipped = apply_gradients(
            state.model, optimizer, total, batch["lr"], batch["step"], backend, clip_grad, skip_norm
        )
        update_ema(state.ema, state.model.module, ema_decay, backend.local_shards)
        update_power_averages(state, batch["step"], backend)
        return {"train/loss": total, "train/grad_norm": norm, "train/skipped": skipped}

    return TrainStep(step)


def clear_gradients(trained: TrainedModule) -> None:
    """Drop the gradients of the previous step."""
    for parameter in trained.parameters().values():
        parameter.grad = None


@torch.no_grad()
def apply_gradients(
    trained: TrainedModule,
    optimizer: AdamW | Muon,
    loss: Tensor,
    lr: Tensor,
    count: Tensor,
    backend: Backend,
    clip_grad: float | None = None,
    skip_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Update a module from its gradients, unless the loss or the gradient is not usable.

    The gradients are cleared, so that no step stores them beyond its end.

    The update is skipped, on all devices alike, if the loss or the gradient norm is not finite or
    the norm exceeds ``skip_norm``.

    Args:
        trained: updated in place.
        optimizer: updates the parameters.
        loss: 0-d, over the global batch.
        lr: 0-d, the learning rate.
        count: 0-d, the number of updates so far.
        backend: holds the module.
        clip_grad: largest L2 norm of the whole gradient; None or 0 disables clipping.
        skip_norm: largest norm before clipping with which the update is made; None: infinity.

    Returns:
        The gradient's norm before clipping, and 1 if the update was skipped, else 0; both 0-d.
    """
    parameters = list(trained.parameters().values())
    gradients = backend.global_gradients(parameters)
    norm = backend.global_norm(gradients)
    usable = torch.isfinite(norm) & torch.isfinite(loss)
    if skip_norm is not None:
        usable = usable & (norm <= skip_norm)
    factor = (clip_grad / (norm + 1e-6)).clamp(max=1.0) if clip_grad else None
    optimizer.apply(trained, gradients, AdamWScalars(lr, count, usable, factor), backend)
    clear_gradients(trained)
    return norm, (~usable).float()


def split_micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into equal micro-batches; micro-batch i gets the rows i, i + parts, ...

    Consecutive rows are on the same device, so every device keeps an equal share of every
    micro-batch and no data moves.
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
