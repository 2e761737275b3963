"""Muon: momentum whose matrices are orthogonalised; AdamW for all other parameters.

Jordan et al. 2024; the form is that of RAEv2 (nanovisionx/RAEv2 @ 8a0d238, "gmuon"). A layer that
is stored as several layers in one matrix (``FusedLinear``) is one matrix for each of them.

The iteration runs on stacks of equally shaped matrices. The backend divides a stack over its
devices (``Backend.apply_to_matrices``): each receives some matrices in full and computes only
those, where every device would otherwise compute all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.layers import FusedLinear
from rae_xla.ops.newton_schulz import PRESETS, orthogonalise
from rae_xla.ops.updates import AdamWScalars
from rae_xla.runtime.blocks import unstacked_names
from rae_xla.train.optimizers import AdamW

if TYPE_CHECKING:
    from rae_xla.checkpoint.train_state import TrainedModule
    from rae_xla.config import OptimizerConfig, TrainingConfig
    from rae_xla.runtime import Backend

# Factor of the update, with which its root mean square is that of AdamW (Moonlight, Liu et al.
# 2025).
_SCALE = 0.2
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Shape:
    """What pieces have in common that are orthogonalised together.

    Attributes:
        rows: of a complete matrix, as it is in the pieces.
        columns: likewise.
        together: number of matrices one above the other in each piece.
        dimension: see ``_Piece``.
    """

    rows: int
    columns: int
    together: int
    dimension: int | None


@dataclass(frozen=True)
class _Piece:
    """A stack of matrices of one parameter, as far as this process holds it.

    Attributes:
        tensor: (n, rows, columns), transposed if there are more rows than columns.
        dimension: the one of ``tensor`` that is sharded over processes; None: the matrices are
            complete.
        transposed: whether it was transposed.
    """

    tensor: Tensor
    dimension: int | None
    transposed: bool


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, AdamW for the rest.

    Attributes:
        adamw: optimizer of the parameters that are not matrices.
        adamw_scale: their learning rate divided by that of the matrices.
        momentum: decay rate of the momentum.
        nesterov: whether the update looks one step of the momentum ahead.
        weight_decay: of the matrices, multiplied by the learning rate.
        preset: coefficients of the iteration, a key of ``PRESETS``.
        dtype: of the iteration's products.
        patterns: names of the matrices, as regular expressions; None for all matrices.
    """

    adamw: AdamW
    adamw_scale: float
    momentum: float
    nesterov: bool
    weight_decay: float
    preset: str
    dtype: torch.dtype
    patterns: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, settings: OptimizerConfig, base_lr: float) -> Muon:
        """Build the optimizer that an ``optimizer`` section describes.

        Args:
            settings: the section.
            base_lr: learning rate of the matrices after the warm-up. The schedule of the other
                parameters is proportional to theirs.
        """
        other_lr = settings.adamw_lr  # the schema refuses it if base_lr is 0
        return cls(
            adamw=AdamW(settings.betas, settings.eps, settings.weight_decay),
            adamw_scale=1.0 if other_lr is None else other_lr / base_lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            preset=settings.preset,
            dtype=_DTYPES[settings.newton_schulz_dtype],
            patterns=settings.matrices,
        )

    def matrices(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the parameters that are optimised as matrices.

        Args:
            parameters: the trained parameters by name. The first dimension of a stacked one counts
                its blocks.

        Raises:
            UserError: a pattern matches a parameter that is not a matrix, or nothing.
        """
        names = [name for name, tensor in parameters.items() if _is_matrix(name, tensor)]
        if self.patterns is None:
            return names
        chosen = []
        for pattern in self.patterns:
            matching = [n for n in parameters if re.search(pattern, unstacked_names(n)[0])]
            others = [name for name in matching if name not in names]
            if others or not matching:
                found = (
                    f"{others[0]}, whose shape is {tuple(parameters[others[0]].shape)}"
                    if others
                    else "no parameter"
                )
                raise UserError(
                    f"training.optimizer.matrices: the pattern {pattern!r} matches {found}: Muon "
                    "orthogonalises matrices only; correct the pattern, or leave it out to "
                    "optimise every matrix"
                )
            chosen += matching
        return [name for name in names if name in chosen]

    @torch.no_grad()
    def apply(
        self,
        trained: TrainedModule,
        gradients: Sequence[Tensor],
        scalars: AdamWScalars,
        backend: Backend,
    ) -> None:
        """Update a module and its moments in place.

        The momentum of a matrix is its first moment; it has no second one.

        Args:
            trained: the module.
            gradients: of its trained parameters, in their order, sharded like them.
            scalars: learning rate, step, whether to update, factor of the gradients.
            backend: holds the module.
        """
        parameters = trained.parameters()
        by_name = dict(zip(parameters, gradients, strict=True))
        matrices = self.matrices(parameters)
        others = [name for name in parameters if name not in set(matrices)]
        first, second = trained.moments.values()
        if others:
            self.adamw.update(
                backend.local_shards([parameters[name] for name in others]),
                backend.local_shards([by_name[name] for name in others]),
                backend.local_shards([first[name] for name in others]),
                backend.local_shards([second[name] for name in others]),
                scalars.lr * self.adamw_scale,
                scalars.step,
                scalars.where,
                scalars.factor,
            )
        if not matrices:
            return
        momenta = backend.local_shards([first[name] for name in matrices])
        directions = self._directions(
            momenta, backend.local_shards([by_name[name] for name in matrices]), scalars
        )
        chosen = [parameters[name] for name in matrices]
        updates = self._orthogonalised(trained.module, matrices, chosen, directions, backend)
        shards = backend.local_shards(chosen)
        lr = torch.where(scalars.where, scalars.lr, 0.0)
        if self.weight_decay:
            torch._foreach_mul_(shards, 1 - lr * self.weight_decay)
        torch._foreach_mul_(updates, lr * _SCALE)
        torch._foreach_sub_(shards, updates)

    def _directions(
        self, momenta: list[Tensor], gradients: list[Tensor], scalars: AdamWScalars
    ) -> list[Tensor]:
        """Update the momenta in place, and return what is orthogonalised."""
        if scalars.factor is not None:
            gradients = list(torch._foreach_mul(gradients, scalars.factor))
        # A step is skipped through its factors, which needs no second copy of the state.
        gradients = [torch.where(scalars.where, gradient, 0.0) for gradient in gradients]
        torch._foreach_mul_(momenta, torch.where(scalars.where, self.momentum, 1.0))
        torch._foreach_add_(momenta, gradients)
        if not self.nesterov:
            return momenta
        ahead = list(torch._foreach_mul(momenta, self.momentum))
        torch._foreach_add_(ahead, gradients)
        return ahead

    def _orthogonalised(
        self,
        module: nn.Module,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        directions: Sequence[Tensor],
        backend: Backend,
    ) -> list[Tensor]:
        """Return the updates of the parameters, scaled by the size of their matrices."""
        parts = _parts(module)
        dimensions = backend.shard_dimensions(parameters)
        groups: dict[_Shape, list[_Piece]] = defaultdict(list)
        order: list[list[tuple[_Shape, int]]] = []
        for name, whole, shard, dimension in zip(
            names, parameters, directions, dimensions, strict=True
        ):
            count = parts.get(name, 1)
            rows, columns = whole.shape[-2] // count, whole.shape[-1]
            # Where rows are sharded, a shard has rows of some of the matrices only.
            together = count if dimension == whole.dim() - 2 else 1
            places = []
            for tensor in shard.chunk(count // together, dim=-2):
                transposed = together == 1 and rows > columns
                piece = _make_piece(tensor, dimension, whole.dim(), transposed)
                sizes = (columns, rows) if transposed else (rows, columns)
                shape = _Shape(*sizes, together, piece.dimension)
                places.append((shape, len(groups[shape])))
                groups[shape].append(piece)
            order.append(places)
        results = {
            shape: self._orthogonalise_group(pieces, shape, backend)
            for shape, pieces in groups.items()
        }
        updates = []
        for shard, places in zip(directions, order, strict=True):
            found = [results[shape][number] for shape, number in places]
            updates.append(torch.cat(found, dim=-2).view(shard.shape))
        return updates

    def _orthogonalise_group(
        self, pieces: Sequence[_Piece], shape: _Shape, backend: Backend
    ) -> list[Tensor]:
        """Orthogonalise matrices of one shape; return them in the layout of the parameters."""

        def function(stack: Tensor) -> Tensor:
            matrices = stack.unflatten(1, (shape.together, -1)).flatten(0, 1)
            tall = matrices.shape[1] > matrices.shape[2]
            matrices = matrices.transpose(1, 2) if tall else matrices
            found = orthogonalise(matrices, PRESETS[self.preset], self.dtype)
            return (found.transpose(1, 2) if tall else found).reshape(stack.shape)

        stack = torch.cat([piece.tensor for piece in pieces])
        result = backend.apply_to_matrices(function, stack, shape.dimension)
        result = result * max(shape.rows, shape.columns) ** 0.5
        sizes = [len(piece.tensor) for piece in pieces]
        return [
            part.transpose(1, 2) if piece.transposed else part
            for part, piece in zip(result.split(sizes), pieces, strict=True)
        ]


def make_optimizer(training: TrainingConfig) -> AdamW | Muon:
    """Build the optimizer of a run's main module."""
    settings, scheduler = training.optimizer, training.scheduler
    if settings.type == "adamw":
        return AdamW.from_config(settings)
    rate = settings.lr if scheduler.base_lr is None else scheduler.base_lr
    return Muon.from_config(settings, rate)


def first_moment_only(training: TrainingConfig, module: nn.Module) -> frozenset[str]:
    """Return the names of the trained parameters of a module that have no second moment.

    Args:
        training: of the run.
        module: not yet placed.

    Raises:
        UserError: see ``Muon.matrices``.
    """
    optimizer = make_optimizer(training)
    if not isinstance(optimizer, Muon):
        return frozenset()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return frozenset(optimizer.matrices(trained))


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.dim() - (len(unstacked_names(name)) > 1) == 2


def _parts(module: nn.Module) -> dict[str, int]:
    """Return the number of matrices in each weight that holds several."""
    return {
        f"{name}.weight" if name else "weight": layer.parts
        for name, layer in module.named_modules()
        if isinstance(layer, FusedLinear) and layer.separate
    }


def _make_piece(tensor: Tensor, dimension: int | None, dims: int, transposed: bool) -> _Piece:
    """Return a tensor of ``dims`` dimensions, sharded along ``dimension``, as a stack."""
    if dims == 2:
        tensor = tensor[None]
        dimension = None if dimension is None else dimension + 1
    if transposed:
        tensor = tensor.transpose(1, 2)
        dimension = None if dimension is None else 3 - dimension
    return _Piece(tensor, dimension, transposed)
