"""One optimizer step as one function of a batch: the function that is compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.train.adamw import AdamW
from rae_xla.train.state import Trained, TrainState, update_ema

LossFn = Callable[[Batch, Draws], Tensor]
"""Per-sample losses (rows,) of a batch, given the draws of its rows."""


@dataclass
class Step:
    """A train step: call it with a batch, it updates the state and returns a vector of figures.

    The batch carries, beside its data, ``row`` (rows,) int32, ``step`` 0-d int32 and ``lr`` 0-d
    float32, and what else the step asks for.

    Attributes:
        figures: the step itself; what it measured, by name, as 0-d tensors.
        names: what the vector holds, known once the step has run.
    """

    figures: Callable[[Batch], Mapping[str, Tensor]]
    names: tuple[str, ...] = field(default=(), init=False)

    def __call__(self, batch: Batch) -> Tensor:
        """Take the step."""
        figures = self.figures(batch)
        self.names = tuple(figures)
        return torch.stack([value.detach().float() for value in figures.values()])


def make_train_step(
    loss_fn: LossFn,
    state: TrainState,
    optimizer: AdamW,
    *,
    seed: int,
    ema_decay: float,
    clip_grad: float | None,
    accumulate: int,
    runtime: Runtime,
    skip_norm: float | None = None,
) -> Step:
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
        runtime: where the state is.
        skip_norm: a step whose gradient has a larger L2 norm is skipped.
    """

    def step(batch: Batch) -> dict[str, Tensor]:
        clear_gradients(state.model)
        total = torch.zeros((), device=batch["row"].device)
        for part in split_batch(batch, accumulate):
            with runtime.autocast():
                losses = loss_fn(part, Draws(seed, part["step"], part["row"]))
            loss = losses.float().mean() / accumulate
            loss.backward()
            total = total + loss.detach()
        [total] = runtime.average([total])
        norm, skipped = apply_gradients(
            state.model, optimizer, total, batch["lr"], batch["step"], runtime, clip_grad, skip_norm
        )
        update_ema(state.ema, state.model.module, ema_decay, runtime.parts)
        return {"train/loss": total, "train/grad_norm": norm, "train/skipped": skipped}

    return Step(step)


def clear_gradients(trained: Trained) -> None:
    """Forget the gradients of the step before."""
    for parameter in trained.parameters().values():
        parameter.grad = None


@torch.no_grad()
def apply_gradients(
    trained: Trained,
    optimizer: AdamW,
    loss: Tensor,
    lr: Tensor,
    count: Tensor,
    runtime: Runtime,
    clip_grad: float | None = None,
    skip_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from the gradients that are there, unless a number in it is not finite, or the
    gradient too large.

    Args:
        trained: what is updated in place.
        optimizer: how.
        loss: 0-d, what the gradients are of, over the global batch.
        lr: 0-d, the learning rate.
        count: 0-d, how many updates came before.
        runtime: where all that is.
        clip_grad: largest L2 norm of the whole gradient; None or 0 leaves it as it is.
        skip_norm: largest norm before clipping with which anything is updated; None: infinity.

    Returns:
        The norm of the gradient before clipping, and 1 where the update was skipped because that
        norm or the loss is not finite, or the norm above ``skip_norm``, else 0; both 0-d.
    """
    parameters = list(trained.parameters().values())
    gradients = runtime.gradients(parameters)
    norm = runtime.norm(gradients)
    useful = torch.isfinite(norm) & torch.isfinite(loss)
    if skip_norm is not None:
        useful = useful & (norm <= skip_norm)
    gradients = runtime.parts(gradients)
    if clip_grad:
        factor = (clip_grad / (norm + 1e-6)).clamp(max=1.0)
        gradients = list(torch._foreach_mul(gradients, factor))
    first, second = (runtime.parts(list(of.values())) for of in trained.moments.values())
    optimizer.update(runtime.parts(parameters), gradients, first, second, lr, count, where=useful)
    return norm, (~useful).float()


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
