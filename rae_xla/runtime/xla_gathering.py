"""FSDP by annotation: where a split weight is put together, and what stays split by rows.

A weight is stored in parts and used whole (or split over ``tensor`` alone). Each layer says so to
the partitioner at the place where it computes: under autocast the part is cast first, so bf16
travels; the gradient is told to go back to the parts, which makes it a reduce-scatter. Left to
propagate, the weights' sharding spreads to the activations instead, which are then moved between
devices at every layer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.models.layers import FusedLinear
from rae_xla.runtime.sharding import PartitionSpec, Placement, Shardings
from rae_xla.runtime.xla_linear import Annotate, LinearUse, Partition, annotated


class Gathering:
    """Makes the layers of placed modules say how they use their weights."""

    def __init__(self, mesh: xs.Mesh) -> None:
        self._mesh = mesh
        self._tracing = False
        self._partition = Partition(mesh, self._annotation, lambda: self._tracing)
        self._done: WeakSet[nn.Module] = WeakSet()

    def apply(self, module: nn.Module, shardings: Shardings) -> None:
        """Change the layers and register the hooks of ``module``, once for each of its modules."""
        for name, child in module.named_modules():
            if child in self._done:
                continue
            self._done.add(child)
            self._use_gathered(name, child, shardings)
            if any(shardings.activations.get(name, ())):
                self._annotate_output(child, shardings.activations[name])

    def _use_gathered(self, name: str, layer: nn.Module, shardings: Shardings) -> None:
        placement = shardings.parameters.get(f"{name}.weight" if name else "weight")
        if placement is None or not any(placement.stored) or type(layer) not in _GATHERED:
            return
        if isinstance(layer, nn.Linear):
            parts = layer.parts if isinstance(layer, FusedLinear) else 1
            layer.products = LinearUse(self._partition, placement, parts)  # type: ignore[assignment]
        else:
            layer.use_weight = self._make_use(placement)  # type: ignore[assignment]
        layer.__class__ = _GATHERED[type(layer)]

    def _make_use(self, placement: Placement) -> Annotate:
        """From the stored weight to the used one."""
        there, back = self._annotation(placement.used), self._annotation(placement.stored)

        def use(weight: Tensor) -> Tensor:
            if torch.is_autocast_enabled(weight.device.type):
                weight = back(weight.to(torch.get_autocast_dtype(weight.device.type)))
            return annotated(weight, there, back)

        return use

    def _annotate_output(self, module: nn.Module, spec: PartitionSpec) -> None:
        annotate = self._annotation(spec)

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(annotated(part, annotate, annotate) for part in output)
            return annotated(output, annotate, annotate)

        module.register_forward_hook(hook)

    def _annotation(self, spec: PartitionSpec) -> Annotate:
        known: dict[int, Any] = {}  # by the number of dimensions

        def annotate(tensor: Tensor) -> Tensor:
            dimensions = tensor.dim()
            if self._tracing:
                later: Tensor = _annotate_later(tensor, repr(_padded(spec, dimensions)))
                return later
            if dimensions not in known:
                known[dimensions] = self._mesh.get_op_sharding(_padded(spec, dimensions))
            marked = tensor.clone()
            # What xs.annotate_custom_sharding does, less the wrapper it returns: this is done a
            # thousand times in each step, by the thread that has the devices to feed.
            torch_xla._XLAC._xla_annotate_custom_sharding(marked, known[dimensions])
            return marked

        return annotate

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Annotate tensors that have no content yet, and of which a graph is made."""
        self._tracing = True
        try:
            yield
        finally:
            self._tracing = False


def _padded(spec: PartitionSpec, dimensions: int) -> PartitionSpec:
    return spec + (None,) * (dimensions - len(spec))


@torch.library.custom_op("rae_xla::annotate_sharding", mutates_args=())
def _annotate_later(tensor: Tensor, spec: str) -> Tensor:
    """An operation of its own, which such graphs can hold."""
    mesh = xs.get_global_mesh()
    assert mesh is not None
    marked = tensor.clone()
    xs.annotate_custom_sharding(marked, mesh, ast.literal_eval(spec))
    return marked


@_annotate_later.register_fake
def _(tensor: Tensor, spec: str) -> Tensor:
    return torch.empty_like(tensor)


_annotate_later.register_autograd(lambda _, gradient: (gradient, None))


class _GatheredLinear(nn.Linear):
    products: LinearUse

    def forward(self, input: Tensor) -> Tensor:
        [result] = self.products(input, self.weight, self.bias)
        return result


class _GatheredFusedLinear(FusedLinear):
    """Here each part has a product of its own: parts of the weight are cut out, not of what it
    gives, whose gradient would be put together from parts and laid out anew (a tenth of a block's
    memory traffic).
    """

    products: LinearUse

    def forward(  # type: ignore[override]
        self, x: Tensor, heads: int | None = None
    ) -> tuple[Tensor, ...]:
        return self.products(x, self.weight, self.bias, heads)


class _GatheredEmbedding(nn.Embedding):
    use_weight: Annotate

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.use_weight(self.weight))


class _GatheredConv2d(nn.Conv2d):
    use_weight: Annotate

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.use_weight(self.weight), self.bias)


_GATHERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _GatheredLinear,
    FusedLinear: _GatheredFusedLinear,
    nn.Embedding: _GatheredEmbedding,
    nn.Conv2d: _GatheredConv2d,
}
