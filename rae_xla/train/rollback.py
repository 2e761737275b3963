"""Rollback: restart from a good checkpoint after too many steps in a row were skipped.

The step counter does not go back. It is the position in the data and in the random numbers, so the
steps since the checkpoint count as skipped and their batches are not used again: from the same
state they would fail in the same way. A run that is killed after a rollback and resumes from the
same checkpoint takes the same steps and rolls back at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.checkpoint.manager import Checkpoint
from rae_xla.checkpoint.resume import choose_checkpoint
from rae_xla.errors import UserError
from rae_xla.runtime import Backend


class SkippedStepsError(Exception):
    """``training.max_skipped`` steps in a row were skipped.

    Attributes:
        step: the last of them.
        skipped: their number.
        rollbacks: earlier rollbacks without a new checkpoint in between.
    """

    def __init__(self, step: int, skipped: int, rollbacks: int) -> None:
        super().__init__(f"{skipped} steps up to step {step} were skipped")
        self.step, self.skipped, self.rollbacks = step, skipped, rollbacks


@dataclass(frozen=True)
class StartPoint:
    """The state and the step that training starts from.

    Attributes:
        checkpoint: has the state; None for a new run.
        step: steps taken; after a rollback more than the checkpoint's.
        rollbacks: rollbacks without a new checkpoint in between.
    """

    checkpoint: Checkpoint | None
    step: int
    rollbacks: int = 0


def roll_back(
    folder: str,
    backend: Backend,
    weights_key: str,
    skips: SkippedStepsError,
    max_rollbacks: int,
) -> StartPoint:
    """Return where to continue: with the newest intact checkpoint from before the skipped steps.

    A checkpoint saved right before them has the very state that they failed from, so an earlier one
    is used.

    Args:
        folder: of the checkpoints.
        backend: whose processes all call this.
        weights_key: ``Task.weights_key``, for the message.
        skips: the skipped steps.
        max_rollbacks: largest number of rollbacks in a row.

    Raises:
        UserError: that number is reached, or there is no such checkpoint.
    """
    good = choose_checkpoint(folder, backend, before=skips.step - skips.skipped)
    if good is not None and skips.rollbacks < max_rollbacks:
        return StartPoint(good, skips.step, skips.rollbacks + 1)
    if good is None:
        advice = "there is no checkpoint from before them"
    else:
        advice = (
            f"the last good checkpoint is {good}; to start from it with other settings use "
            f"--results-dir NEW {weights_key}={good}"
        )
    after = f", after {skips.rollbacks} rollbacks" if skips.rollbacks else ""
    raise UserError(
        f"{skips.skipped} steps in a row were skipped{after}, because the loss or the gradient was "
        f"not finite or the gradient norm was above training.skip_grad_norm: {advice}. Try a lower "
        "learning rate, training.clip_grad, or runtime.precision=fp32"
    )
