"""Linear layers with a sharded weight: which tensors are communicated, and when.

The form of the computation depends on shapes alone:

* Few rows in the global batch (the modulation, one row for each image): the weight stays sharded.
  Each device computes its share of the output features for all rows, and the results return to the
  devices of their rows. This sends less than gathering the weight, and the gradient of the weight
  needs no sum over devices.
* Many rows: the weight is gathered. Its gradient is one product of each device's rows and one
  reduce-scatter, which are spelled out with manual partitioning. Left to itself, the partitioner
  makes a loop that reads the activations once for every two devices, which is half of a step's
  memory traffic on 16 chips.
* A ``tensor`` axis takes part: the weight is gathered over the other axes, and the partitioner
  derives the gradient.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor
from torch.nn import functional as F

from rae_xla.runtime.sharding import Placement, entry_axes
from rae_xla.runtime.xla.spmd_mesh import Annotate, SpmdMesh, annotated

LANES = 128
"""Width of a TPU's registers: tensors are stored in tiles of as many columns."""


class ShardedLinear:
    """The computation of one linear layer, or of several layers that are stored as one.

    Args:
        mesh: of the run.
        placement: of the weight, (out, in).
        parts: number of layers of equal width whose weights are concatenated along ``out``.
    """

    def __init__(self, mesh: SpmdMesh, placement: Placement, parts: int) -> None:
        self.mesh, self.parts = mesh, parts
        stored, used = placement.stored, placement.used
        self.stored_spec = stored
        axes = entry_axes(stored[0]) or entry_axes(stored[1])
        fsdp_only = axes == ("fsdp",) and not any(used)
        self._feature_axes = entry_axes(stored[0]) if fsdp_only else ()
        self._scatters_gradient = fsdp_only
        # The gradient is scattered by rows, which are contiguous in memory. Concatenated layers
        # are scattered one by one along the input features, so that a share of each is the same
        # share of the concatenation.
        self.transposed = parts > 1 or not stored[0]
        self.as_stored = mesh.annotation(stored)
        self._as_gathered = mesh.annotation(used if parts == 1 else ())
        self._part_as_used = mesh.annotation(used)
        self._part_as_stored = mesh.annotation((None, axes))
        self._as_batch = mesh.annotation((mesh.batch_axes,))
        other_axes = tuple(axis for axis in mesh.batch_axes if axis not in self._feature_axes)
        self._row_spec = (other_axes or None,)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int | None = None
    ) -> tuple[Tensor, ...]:
        """Apply every layer to ``x``.

        Args:
            x: (..., in); (B, L, in) if ``heads`` is given.
            weight: (out, in).
            bias: (out,).
            heads: number of attention heads to split the outputs into.

        Returns:
            One output per layer: (..., out / parts), or (B, heads, L, out / parts / heads).
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            weight = self.as_stored(weight.to(torch.get_autocast_dtype(device)))
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        with torch.autocast(device, enabled=False):
            if self._feature_axes and heads is None and x.shape[:-1].numel() < weight.shape[0]:
                return self._by_features(x, weight, bias)
            gathered = annotated(weight, self._as_gathered, self.as_stored)
            if self._scatters_gradient and self.mesh.splits_rows_evenly(x):
                results = _GatheredProducts.apply(self, x, weight, gathered, heads)
            else:
                results = [_product(x, part, heads) for part in self._split(gathered)]
            if bias is None:
                return tuple(results)
            biases = bias.view(self.parts, *(() if heads is None else (heads, 1)), -1)
            return tuple(y + b for y, b in zip(results, biases.unbind(0), strict=True))

    def _split(self, gathered: Tensor) -> Sequence[Tensor]:
        """Split the weight into its layers, each annotated like the full weight."""
        if self.parts == 1:
            return [gathered]
        parts = gathered.chunk(self.parts)
        return [annotated(part, self._part_as_used, self._part_as_stored) for part in parts]

    def _by_features(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Multiply all rows with the features of each device, and return the rows."""
        annotation = self.mesh.annotation
        features = annotation((*self._row_spec, *(None,) * (x.dim() - 2), self._feature_axes))
        x = annotated(x, annotation(self._row_spec), self._as_batch)
        y = _FeatureShardedProduct.apply(self, x, weight)
        y = y if bias is None else y + bias
        y = annotated(y, features, features)
        return annotated(y, self._as_batch, self._as_batch).chunk(self.parts, dim=-1)

    def input_gradient_by_features(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of few rows, (rows, in).

        The term of each device's features is sent to the device of the rows, which adds them in
        float32.

        Args:
            gradient: (rows, out).
            weight: (out, in), sharded by features.
        """
        annotation = self.mesh.annotation
        features, rows = self._feature_axes, self._row_spec[0]
        shards = weight.unflatten(0, (self.mesh.shard_count(features), -1))
        terms = torch.einsum("rnf,nfi->nri", gradient.unflatten(-1, shards.shape[:2]), shards)
        by_features = annotation((features, rows))(terms)
        by_rows = annotation((None, self.mesh.batch_axes))(by_features)
        return by_rows.float().sum(0).to(gradient.dtype)

    def weight_gradient(self, gradients: Sequence[Tensor], x: Tensor, heads: int | None) -> Tensor:
        """Return the gradient of the weight, sharded as it is stored.

        Args:
            gradients: of each layer's output.
            x: input of the layers.
            heads: as in ``__call__``.
        """
        if self.mesh.is_tracing:
            result: Tensor = _weight_gradient_operator(
                list(gradients), x, heads or 0, self.transposed, repr(self.stored_spec)
            )
            return result
        return _scattered_weight_gradient(
            self.mesh, gradients, x, heads, self.transposed, self.as_stored
        )


def _scattered_weight_gradient(
    mesh: SpmdMesh,
    gradients: Sequence[Tensor],
    x: Tensor,
    heads: int | None,
    transposed: bool,
    as_stored: Annotate,
) -> Tensor:
    """Multiply the rows of each device, and reduce-scatter the products."""
    rows = mesh.local_rows(x)
    sums = [
        _reduce_scatter(mesh, _weight_product(mesh.local_rows(gradient), rows, heads, transposed))
        for gradient in gradients
    ]
    if transposed:
        result = mesh.global_tensor(torch.cat(sums, 1).t(), (None, "fsdp"))
    else:
        result = mesh.global_tensor(torch.cat(sums), ("fsdp", None))
    return as_stored(result)


def _reduce_scatter(mesh: SpmdMesh, product: Tensor) -> Tensor:
    """Sum a matrix over all devices, of which each gets some rows.

    The compiler stores a matrix by columns if that needs no padding while storing it by rows does,
    and then sends it in an all-reduce. Such a matrix is padded.
    """
    rows, columns = product.shape
    if rows % LANES or columns % LANES == 0:
        return mesh.reduce_scatter(product)
    total = mesh.reduce_scatter(F.pad(product, (0, -columns % LANES)))
    xm.optimization_barrier_([total])  # the compiler cannot combine a scatter with the slice
    return total[:, :columns]


@torch.library.custom_op("rae_xla::weight_gradient", mutates_args=())
def _weight_gradient_operator(
    gradients: list[Tensor], x: Tensor, heads: int, transposed: bool, stored: str
) -> Tensor:
    """``_scattered_weight_gradient`` as one operator, which the graph of a scan can hold.

    Graphs hold numbers and text but no objects: the mesh is torch_xla's global one, and the stored
    spec is text.
    """
    mesh = SpmdMesh.current()
    as_stored = mesh.annotation(ast.literal_eval(stored))
    return _scattered_weight_gradient(mesh, gradients, x, heads or None, transposed, as_stored)


@_weight_gradient_operator.register_fake
def _(gradients: list[Tensor], x: Tensor, heads: int, transposed: bool, stored: str) -> Tensor:
    features = sum(g.shape[-1] * (heads or 1) for g in gradients)
    return x.new_empty(features, x.shape[-1])


class _FeatureShardedProduct(torch.autograd.Function):
    """A product whose output features are sharded like the rows of its weight."""

    @staticmethod
    def forward(ctx: Any, layer: ShardedLinear, x: Tensor, weight: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer: ShardedLinear = ctx.layer
        x_gradient = weight_gradient = None
        with torch.autocast(x.device.type, enabled=False):
            rows = gradient.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                x_gradient = layer.input_gradient_by_features(rows, weight).view(x.shape)
            if ctx.needs_input_grad[2]:
                product = torch.einsum("ro,ri->oi", rows, x.flatten(0, -2))
                weight_gradient = layer.as_stored(product)
        return None, x_gradient, weight_gradient


class _GatheredProducts(torch.autograd.Function):
    """The product with each layer of a gathered weight, whose gradient is reduce-scattered.

    ``weight`` is the stored weight, which gets the gradient, and ``gathered`` the same weight on
    every device, which is saved for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: ShardedLinear,
        x: Tensor,
        weight: Tensor,
        gathered: Tensor,
        heads: int | None,
    ) -> tuple[Tensor, ...]:
        ctx.layer, ctx.heads = layer, heads
        ctx.save_for_backward(x, gathered)
        return tuple(_product(x, part, heads) for part in gathered.chunk(layer.parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered = ctx.saved_tensors
        layer, heads = ctx.layer, ctx.heads
        x_gradient = weight_gradient = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                parts = zip(gradients, gathered.chunk(layer.parts), strict=True)
                terms = [_input_product(gradient, part, heads) for gradient, part in parts]
                x_gradient = functools.reduce(torch.add, terms)
            if ctx.needs_input_grad[2]:
                weight_gradient = layer.weight_gradient(gradients, x, heads)
        return None, x_gradient, weight_gradient, None, None


# The products are einsums over named dimensions: no layout of their results costs a copy.


def _product(x: Tensor, weight: Tensor, heads: int | None) -> Tensor:
    """x @ weight.T, split into ``heads`` if given."""
    if heads is not None:
        return torch.einsum("bli,hdi->bhld", x, weight.unflatten(0, (heads, -1)))
    rows = _row_letters(x)
    return torch.einsum(f"{rows}i,oi->{rows}o", x, weight)


def _input_product(gradient: Tensor, weight: Tensor, heads: int | None) -> Tensor:
    """The gradient of ``_product`` with respect to ``x``."""
    if heads is not None:
        return torch.einsum("bhld,hdi->bli", gradient, weight.unflatten(0, (heads, -1)))
    rows = _row_letters(gradient)
    return torch.einsum(f"{rows}o,oi->{rows}i", gradient, weight)


def _weight_product(gradient: Tensor, x: Tensor, heads: int | None, transposed: bool) -> Tensor:
    """The gradient of ``_product`` with respect to ``weight``: (out, in), transposed (in, out)."""
    if heads is not None:
        found = torch.einsum("bhld,bli->" + ("ihd" if transposed else "hdi"), gradient, x)
        return found.flatten(1) if transposed else found.flatten(0, 1)
    rows = _row_letters(x)
    return torch.einsum(f"{rows}o,{rows}i->" + ("io" if transposed else "oi"), gradient, x)


def _row_letters(x: Tensor) -> str:
    """Einsum letters of all dimensions but the last."""
    return "abcdefgh"[: x.dim() - 1]
