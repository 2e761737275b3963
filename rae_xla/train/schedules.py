"""Learning rate schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rae_xla.config import OptimizerConfig, SchedulerConfig


@dataclass(frozen=True)
class Schedule:
    """Warm-up followed by a linear or cosine decay to ``final_lr``.

    Attributes:
        kind: ``linear`` or ``cosine``.
        base_lr: the learning rate after warm-up.
        final_lr: the learning rate from ``decay_end`` on.
        warmup: number of steps during which the rate is ``base_lr * (step + 1) / warmup`` if
            ``warmup_from_zero``, else ``base_lr``.
        decay_end: the step at which ``final_lr`` is reached; at least ``warmup``.
    """

    kind: str
    base_lr: float
    final_lr: float
    warmup: int
    decay_end: int
    warmup_from_zero: bool

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step number ``step`` (from 0)."""
        if step < self.warmup:
            return (
                self.base_lr * (step + 1) / self.warmup if self.warmup_from_zero else self.base_lr
            )
        if step >= self.decay_end:
            return self.final_lr
        progress = (step - self.warmup) / (self.decay_end - self.warmup)
        if self.kind == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.base_lr + (self.final_lr - self.base_lr) * progress


def make_schedule(
    optimizer: OptimizerConfig, scheduler: SchedulerConfig, steps_per_epoch: int
) -> Schedule:
    """Build the schedule of an ``optimizer`` and a ``scheduler`` section; epochs become steps."""
    base_lr = optimizer.lr if scheduler.base_lr is None else scheduler.base_lr

    def steps(in_steps: int | None, in_epochs: float | None) -> int:
        return in_steps if in_steps is not None else int((in_epochs or 0) * steps_per_epoch)

    warmup = steps(scheduler.warmup_steps, scheduler.warmup_epochs)
    return Schedule(
        kind=scheduler.type,
        base_lr=base_lr,
        final_lr=base_lr if scheduler.final_lr is None else scheduler.final_lr,
        warmup=warmup,
        decay_end=max(warmup, steps(scheduler.decay_end_steps, scheduler.decay_end_epoch)),
        warmup_from_zero=scheduler.warmup_from_zero,
    )
