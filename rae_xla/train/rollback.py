"""What is done when step after step gives nothing: back to a good checkpoint, past the bad data.

The step counter does not go back. It is the position in the data and in the random numbers, so the
steps since the checkpoint count as skipped ones and their batches are not seen again: from the same
state, they would fail in the same way. A run that is killed after it went back, and resumed from
the same checkpoint, takes the same steps and goes back at the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import Checkpoint
from rae_xla.runtime import Runtime
from rae_xla.train.checkpoint import choose_checkpoint


class SkippedStepsError(Exception):
    """As many steps in a row as ``training.max_skipped`` were skipped.

    Attributes:
        step: the last of them.
        skipped: how many.
        rollbacks: how often the run went back before, without making a checkpoint in between.
    """

    def __init__(self, step: int, skipped: int, rollbacks: int) -> None:
        super().__init__(f"{skipped} steps up to {step} were skipped")
        self.step, self.skipped, self.rollbacks = step, skipped, rollbacks


@dataclass(frozen=True)
class Beginning:
    """Where a run goes on.

    Attributes:
        checkpoint: the state; None for a fresh one.
        step: steps taken; after going back more than the checkpoint's.
        rollbacks: how often the run went back without making a checkpoint in between.
    """

    checkpoint: Checkpoint | None
    step: int
    rollbacks: int = 0


def go_back(
    folder: str,
    runtime: Runtime,
    stage_name: str,
    skips: SkippedStepsError,
    max_rollbacks: int,
) -> Beginning:
    """The state to go on from: of the newest whole checkpoint from before the skipped steps.

    One made right before them is of the very state that they failed from: it is not called good.

    Args:
        folder: of the checkpoints.
        runtime: whose processes all call this.
        stage_name: of the run.
        skips: what happened.
        max_rollbacks: how often in a row this may be done.

    Raises:
        UserError: it was done often enough, or there is no such checkpoint.
    """
    good = choose_checkpoint(folder, runtime, before=skips.step - skips.skipped)
    if good is not None and skips.rollbacks < max_rollbacks:
        return Beginning(good, skips.step, skips.rollbacks + 1)
    if good is None:
        last = "there is no checkpoint from before them"
    else:
        last = (
            f"the last good checkpoint, from before them, is {good}. To go on from it with other "
            f"settings: --results-dir NEW {stage_name.replace('stage', 'stage_')}.ckpt={good}"
        )
    before = f", after going back {skips.rollbacks} times" if skips.rollbacks else ""
    raise UserError(
        f"{skips.skipped} steps in a row had a loss or a gradient that is not finite (or above "
        f"training.skip_grad_norm) and were skipped{before}: nothing is learned any more; {last}. "
        "Try a lower learning rate, training.clip_grad, or runtime.precision=fp32"
    )
