"""The optimizer of a train step: a function of tensors, without state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.ops.updates import AdamWScalars, AdamWSettings, AdamWTensors, adamw_

if TYPE_CHECKING:
    from rae_xla.checkpoint.train_state import TrainedModule
    from rae_xla.config import OptimizerConfig
    from rae_xla.runtime import Backend


@dataclass(frozen=True)
class AdamW(AdamWSettings):
    """Adam with decoupled weight decay, as in torch.optim; see ``ops.updates``."""

    @classmethod
    def from_config(cls, settings: OptimizerConfig) -> AdamW:
        """Build the optimizer that an ``optimizer`` section describes.

        Raises:
            UserError: it describes another one.
        """
        if settings.type != "adamw":
            raise UserError(
                f"optimizer.type {settings.type}: only the main model of stage 1 and of stage 2 "
                "can be trained with it; leave the type out for the other networks"
            )
        return cls(settings.betas, settings.eps, settings.weight_decay)

    def update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        lr: Tensor,
        step: Tensor,
        where: Tensor,
        factor: Tensor | None = None,
    ) -> None:
        """Update parameters and moments in place.

        Args:
            parameters: the trained parameters.
            gradients: one for each parameter; they may be overwritten.
            first: first moments, zeros before the first step.
            second: second moments, zeros before the first step.
            lr: 0-d, the learning rate of this step.
            step: 0-d, the number of earlier steps.
            where: 0-d bool; False leaves parameters and moments unchanged, even if gradients are
                not finite.
            factor: 0-d, multiplies the gradients first; None for 1.
        """
        tensors = AdamWTensors(parameters, gradients, first, second)
        adamw_(self, tensors, AdamWScalars(lr, step, where, factor))

    def apply(
        self,
        trained: TrainedModule,
        gradients: Sequence[Tensor],
        scalars: AdamWScalars,
        backend: Backend,
    ) -> None:
        """Update a module and its moments in place.

        Args:
            trained: the module.
            gradients: of its trained parameters, in their order, sharded like them.
            scalars: learning rate, step, whether to update, factor of the gradients.
            backend: holds the module.
        """
        first, second = (backend.local_shards(list(of.values())) for of in trained.moments.values())
        shards = backend.local_shards(list(trained.parameters().values()))
        tensors = AdamWTensors(shards, backend.local_shards(gradients), first, second)
        adamw_(self, tensors, scalars)
