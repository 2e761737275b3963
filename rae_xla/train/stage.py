"""What the two stages have in common: the loop asks this of a stage, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from torch import Tensor, nn

from rae_xla.interop.manifest import Manifest
from rae_xla.runtime import Runtime
from rae_xla.sample.pictures import Pixels
from rae_xla.train.state import TrainState
from rae_xla.train.step import Step

StateDict = Mapping[str, Tensor]


class Stage(Protocol):
    """One stage of one run, built on the CPU.

    Raises:
        UserError: on construction, where configuration, data and files do not allow it.
    """

    @property
    def model(self) -> nn.Module:
        """What is trained, and averaged."""
        ...

    @property
    def disc(self) -> nn.Module | None:
        """A discriminator that is trained beside it."""
        ...

    @property
    def frozen(self) -> nn.Module:
        """What the losses use besides; it may contain ``model``."""
        ...

    @property
    def ties(self) -> Manifest:
        """Which other weights those that are trained belong with, where nobody else would say."""
        ...

    def phase(self, step: int) -> Hashable:
        """What kind of step number ``step`` is (from 0). Each kind is compiled once."""
        ...

    def make_step(self, phase: Hashable, state: TrainState, runtime: Runtime | None = None) -> Step:
        """The step of a phase, not yet compiled; ``runtime`` is where the state is, if that is not
        the run's.
        """
        ...

    def inputs(self, step: int) -> dict[str, Tensor]:
        """What this step is told besides its data: 0-d tensors, ``lr`` among them."""
        ...

    def publish(self, state: StateDict) -> dict[str, Tensor]:
        """From a state dict of ``model`` to the one the published checkpoints hold."""
        ...

    def unpublish(self, state: StateDict) -> dict[str, Tensor]:
        """The way back."""
        ...

    @property
    def caption(self) -> str:
        """What ``preview`` shows."""
        ...

    def preview(self, state: TrainState) -> Pixels:
        """A picture, (H, W, 3) uint8, of what the model can do by now."""
        ...

    def evaluate(
        self, state: TrainState, moved: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Figures of quality, by name (``eval/psnr``). ``moved`` is called now and then, for a
        watchdog to see that it goes on; ``lite`` asks for what little shows that all is well.
        """
        ...
