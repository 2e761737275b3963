"""How long a run is and when it does what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


@dataclass(frozen=True)
class Plan:
    """How long a run is and when it does what, in steps."""

    total: int
    per_epoch: int
    global_batch: int
    log_every: int
    sample_every: int
    checkpoint_every: int
    eval_every: int
    eval_lite_every: int = 0

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps, and at the end, is due after ``step``."""
        return step == self.total or (every > 0 and step % every == 0)

    def evaluation(self, step: int) -> Literal["whole", "lite"] | None:
        """Which evaluation is due after ``step``, if any: small ones until the first whole one."""
        if self.eval_every and self.due(self.eval_every, step):
            return "whole"
        lite = self.eval_lite_every
        return "lite" if lite and step < self.eval_every and step % lite == 0 else None


def make_plan(config: RunConfig, per_epoch: int, global_batch: int) -> Plan:
    """The plan of a run whose epochs are ``per_epoch`` steps long."""
    training, checkpoint = config.training, config.checkpoint
    every = checkpoint.every_steps
    return Plan(
        total=training.steps if training.steps is not None else training.epochs * per_epoch,
        per_epoch=per_epoch,
        global_batch=global_batch,
        log_every=training.log_every,
        sample_every=training.sample_every,
        checkpoint_every=every if every else training.checkpoint_interval * per_epoch,
        eval_every=config.eval.eval_interval if config.eval is not None else 0,
        # of stage 2 alone
        eval_lite_every=config.eval.lite_interval if config.eval and config.stage_2 else 0,
    )
