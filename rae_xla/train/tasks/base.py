"""The interface of a task: what the trainer needs to know about one kind of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import TrainState
from rae_xla.config import RunConfig
from rae_xla.data.batch_builder import RowArrays
from rae_xla.data.mixture import Mixture
from rae_xla.models.pretrained.manifest import Manifest
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import Pixels
from rae_xla.train.muon import first_moment_only, make_optimizer
from rae_xla.train.schedules import make_schedule
from rae_xla.train.train_step import TrainStep, make_train_step

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Preview:
    """An image that shows what the model can do at this point of training.

    Attributes:
        image: (H, W, 3) uint8.
        caption: one line that explains it.
    """

    image: Pixels
    caption: str


class Task(ABC):
    """One kind of training: its models, its loss, its preview and its evaluation.

    A task is built on the CPU; the trainer then places ``model``, ``disc`` and ``frozen`` on the
    devices. Its constructor takes ``(config, backend, data, steps_per_epoch)``; ``data`` is None
    where the task is only planned or counted, not trained. It raises ``UserError`` where the
    configuration, the data and the files do not fit each other.

    A subclass sets ``model`` and implements ``make_step``, or derives from ``LossTask`` and
    implements ``loss``. It overrides the rest as needed.

    Attributes:
        config: of the run.
        backend: of the run.
        model: the module that is trained, and whose exponential moving average is kept.
        disc: a discriminator that is trained along with it.
        frozen: the other modules that the loss uses; it may contain ``model``.
        provenance: the weights that ``model`` is trained against and only works with.
    """

    weights_key: ClassVar[str]
    """The configuration key that loads weights of this task, such as ``stage_2.ckpt``."""
    crop: ClassVar[Literal["center", "random"]] = "center"
    """What ``data.crop: auto`` means: ``center`` or ``random``."""
    flip: ClassVar[bool] = False
    """What ``data.flip: null`` means: whether half of the images are mirrored."""

    model: nn.Module
    disc: nn.Module | None = None
    frozen: nn.Module
    provenance: Manifest

    def __init__(
        self, config: RunConfig, backend: Backend, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        self.config, self.backend = config, backend
        training = config.training
        self._schedule = make_schedule(training.optimizer, training.scheduler, steps_per_epoch)
        self.frozen, self.provenance = nn.ModuleList(), Manifest()

    @classmethod
    def row_arrays(cls, config: RunConfig, data: Mixture) -> RowArrays | None:
        """Return what makes further arrays of every row of a batch; None if there are none.

        It is used in the loader's worker processes: it pickles, and its module imports no torch.
        """
        return None

    def phase(self, step: int) -> Hashable:
        """Return the phase that step number ``step`` (from 0) belongs to.

        Every phase is compiled once. Its ``str`` is shown in the log.
        """
        return "training"

    def inputs(self, step: int) -> dict[str, Tensor]:
        """Return the scalars that a step needs besides its data, as 0-d tensors, with ``lr``."""
        return {"lr": torch.tensor(self._schedule(step), dtype=torch.float32)}

    @property
    def smallest_batch(self) -> int:
        """Fewest rows of a process that a step can be built for."""
        return self.config.training.grad_accum_steps

    def example_batch(self, rows: int, image_size: int) -> dict[str, Tensor]:
        """Return uninitialised rows with the shapes and types that the loader gives them.

        Tools use them to trace or count a step without data. The numbers of the rows and the
        scalars of the step are not included.
        """
        return {
            "image": torch.empty(rows, 3, image_size, image_size, dtype=torch.uint8),
            "label": torch.empty(rows, dtype=torch.int64),
        }

    @property
    def first_moment_only(self) -> frozenset[str]:
        """Names of the parameters of ``model`` for which the optimizer keeps one moment."""
        return first_moment_only(self.config.training, self.model)

    @property
    def average_widths(self) -> tuple[float, ...]:
        """Widths of the power-function averages of ``model``; see ``checkpoint.posthoc_ema``."""
        return tuple(dict.fromkeys(self.config.training.posthoc_ema.widths))

    @abstractmethod
    def make_step(
        self, phase: Hashable, state: TrainState, backend: Backend | None = None
    ) -> TrainStep:
        """Build the step of a phase, not compiled.

        Args:
            phase: one that ``phase`` returns.
            state: updated in place by the step.
            backend: holds ``state``; by default the backend of the run.
        """

    def to_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Convert a state dict of ``model`` to the layout of the published checkpoints."""
        return dict(state)

    def from_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Convert a state dict in the published layout to one of ``model``."""
        return dict(state)

    def preview(self, state: TrainState) -> Preview | None:
        """Return an image of what the model can do; None if the task has no preview.

        All processes call this together.
        """
        return None

    def evaluate(
        self, state: TrainState, on_progress: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Return quality metrics by name, such as ``eval/psnr``.

        All processes call this together.

        Args:
            state: of the run.
            on_progress: called regularly, so that the watchdog registers progress.
            lite: compute only the inexpensive metrics of ``eval.lite_interval``.
        """
        return {}


class LossTask(Task):
    """A task that minimises one loss with one optimizer: a subclass implements ``loss``."""

    @abstractmethod
    def loss(self, batch: Batch, draws: CounterRNG) -> Tensor:
        """Return the loss of every sample of a batch.

        It is traced into the compiled step: it may not depend on values of tensors or on state.

        Args:
            batch: tensors on the devices, with ``image`` (B, 3, H, W) uint8 and ``label`` (B,).
            draws: random numbers of the batch's samples.

        Returns:
            (B,), differentiable with respect to the parameters of ``model``.
        """

    def make_step(
        self, phase: Hashable, state: TrainState, backend: Backend | None = None
    ) -> TrainStep:
        """Build the step: the optimizer on the mean of ``loss`` over the global batch, then EMA."""
        training = self.config.training
        return make_train_step(
            self.loss,
            state,
            make_optimizer(training),
            seed=training.global_seed,
            ema_decay=training.ema_decay,
            clip_grad=training.clip_grad,
            accumulate=training.grad_accum_steps,
            backend=backend or self.backend,
            skip_norm=training.skip_grad_norm,
        )
