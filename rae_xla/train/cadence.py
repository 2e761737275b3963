"""Cadence: how many steps a run has, and after which of them something is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


@dataclass(frozen=True)
class Cadence:
    """The length of a run and its intervals, all in optimizer steps; 0 means never.

    Attributes:
        total: steps of the whole run.
        per_epoch: steps of one pass over the training data.
        global_batch: images of a step, over all processes.
        log_every: steps between two lines of metrics.
        sample_every: steps between two previews.
        checkpoint_every: steps between two checkpoints.
        eval_every: steps between two full evaluations.
        eval_lite_every: steps between two lite evaluations, before the first full one.
    """

    total: int
    per_epoch: int
    global_batch: int
    log_every: int
    sample_every: int
    checkpoint_every: int
    eval_every: int
    eval_lite_every: int = 0

    def is_due(self, every: int, step: int) -> bool:
        """Return whether something done every ``every`` steps, and at the end, is due."""
        return step == self.total or (every > 0 and step % every == 0)

    def evaluation(self, step: int) -> Literal["full", "lite"] | None:
        """Return the evaluation that is due after ``step`` steps, if any."""
        if self.eval_every and self.is_due(self.eval_every, step):
            return "full"
        lite = self.eval_lite_every
        return "lite" if lite and step < self.eval_every and step % lite == 0 else None


def make_cadence(config: RunConfig, per_epoch: int, global_batch: int) -> Cadence:
    """Build the cadence of a run from its configuration and the length of an epoch."""
    training, checkpoint = config.training, config.checkpoint
    every = checkpoint.every_steps
    return Cadence(
        total=training.steps if training.steps is not None else training.epochs * per_epoch,
        per_epoch=per_epoch,
        global_batch=global_batch,
        log_every=training.log_every,
        sample_every=training.sample_every,
        checkpoint_every=every if every else training.checkpoint_interval * per_epoch,
        eval_every=config.eval.eval_interval if config.eval is not None else 0,
        # Only stage 2 has a lite evaluation.
        eval_lite_every=config.eval.lite_interval if config.eval and config.stage_2 else 0,
    )
