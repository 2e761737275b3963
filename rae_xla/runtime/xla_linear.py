"""Linear layers whose weight is stored in parts: what travels, and when.

Three ways, told apart by shapes alone:

* Few rows in the whole batch (the modulation of each image): the weight stays in its parts. Each
  device computes its share of the features for the rows of all, and the rows go back to where they
  belong. That is less than the weight, and the weight's gradient needs no sum over devices.
* Many rows: the weight is gathered. Its gradient is one product of each device's rows and one
  reduce-scatter, both said outright. Left to the partitioner, the two become a loop that reads the
  activations again for every two devices: half of a step's memory traffic on 16 chips.
* Over a ``tensor`` axis: the weight is gathered, and the partitioner makes the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor
from torch.nn import functional as F

from rae_xla.runtime.mesh import BATCH
from rae_xla.runtime.sharding import Entry, PartitionSpec, Placement, shard_count

Annotate = Callable[[Tensor], Tensor]


def annotated(tensor: Tensor, there: Annotate, back: Annotate) -> Tensor:
    """Note one thing on a tensor, and one on its gradient on the way back."""
    marked: Tensor = _Annotated.apply(tensor, there, back)
    return marked


class _Annotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Annotate, back: Annotate) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradient), None, None


class Partition:
    """How tensors are split over the devices, told to the partitioner or taken from it.

    Args:
        mesh: of the devices; axes of one device are left out.
        annotation: from a spec to what notes it on a tensor.
        tracing: whether a graph is being made of tensors that have no content.
    """

    def __init__(
        self,
        mesh: xs.Mesh,
        annotation: Callable[[PartitionSpec], Annotate],
        tracing: Callable[[], bool],
    ) -> None:
        self._mesh, self.annotation, self.tracing = mesh, annotation, tracing
        self._sizes = dict(mesh.shape())
        self.batch = tuple(axis for axis in BATCH if axis in self._sizes)

    def size(self, entry: Entry) -> int:
        """Devices along an axis, or along several."""
        return shard_count(entry, self._sizes)

    def rows_apart(self, x: Tensor) -> bool:
        """Whether every device has rows of ``x`` of its own, as many as the others."""
        parts = shard_count(self.batch, self._sizes)
        return parts == self._mesh.size() and x.shape[0] % parts == 0

    def own_rows(self, tensor: Tensor) -> Tensor:
        """The rows of each device. What is made of them is no longer the partitioner's."""
        marked = self.annotation((self.batch,))(tensor)
        return cast("Tensor", torch_xla._XLAC._spmd_full_to_shard_shape(marked))

    def sum_scattered(self, local: Tensor) -> Tensor:
        """Sum over all devices; along ``fsdp`` each keeps its part of the first dimension."""
        backend = torch_xla._XLAC
        size, groups = self._sizes["fsdp"], self._neighbours("fsdp")
        local = backend._xla_spmd_reduce_scatter("sum", local, 1.0, 0, size, groups)
        if "data" in self._sizes:
            local = backend._xla_spmd_all_reduce("sum", local, 1.0, self._neighbours("data"))
        return cast("Tensor", local)

    def whole(self, local: Tensor, spec: PartitionSpec) -> Tensor:
        """The tensor whose parts the devices have: the partitioner's again."""
        shape = [
            size * shard_count(entry, self._sizes)
            for size, entry in zip(local.shape, spec, strict=True)
        ]
        backend = torch_xla._XLAC
        manual = backend.OpSharding([], [], [], xs.ShardingType.MANUAL)
        backend._mark_manual_sharding(local, manual)
        sharding = self._mesh.get_op_sharding(spec)
        found = backend._spmd_shard_to_full_shape(local, sharding, torch.Size(shape), local.dtype)
        return cast("Tensor", found)

    def _neighbours(self, axis: str) -> list[list[int]]:
        """Groups of devices that differ in their place along one axis alone."""
        position = self._mesh.get_axis_name_idx(axis)
        devices = self._mesh.get_logical_mesh().swapaxes(position, -1)
        return cast("list[list[int]]", devices.reshape(-1, devices.shape[-1]).tolist())


class LinearUse:
    """How one linear layer uses its weight.

    Args:
        partition: of its tensors.
        placement: of the weight, (out, in).
        parts: layers of equal width that are stored as one, one below the other.
    """

    def __init__(self, partition: Partition, placement: Placement, parts: int) -> None:
        self.partition, self.parts = partition, parts
        stored, used = placement.stored, placement.used
        axes = _axes(stored[0]) or _axes(stored[1])
        alone = axes == ("fsdp",) and not any(used)  # no `tensor` axis takes part
        self._features = _axes(stored[0]) if alone else ()
        self._scatters = alone
        # Parts of the sum are rows, which lie together in memory; of layers stored as one each
        # scatters its own, by input features, and a share of them all is the same share of each.
        self.turned = parts > 1 or not stored[0]
        note = partition.annotation
        self.as_stored = note(stored)
        self._gathered = note(used if parts == 1 else ())
        self._part, self._part_stored = note(used), note((None, axes))
        self._batch = note((partition.batch,))
        rows = tuple(axis for axis in partition.batch if axis not in self._features)
        self._rows = (rows or None,)
        self._number = len(_USES)
        _USES.append(self)

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int | None = None
    ) -> tuple[Tensor, ...]:
        """(..., in) -> (..., out / parts) of each part; cut into heads, of (B, L, in) it makes
        (B, heads, L, out / parts / heads).
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            weight = self.as_stored(weight.to(torch.get_autocast_dtype(device)))
        x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        with torch.autocast(device, enabled=False):
            if self._features and heads is None and x.shape[:-1].numel() < weight.shape[0]:
                return self._by_features(x, weight, bias)
            gathered = annotated(weight, self._gathered, self.as_stored)
            if self._scatters and self.partition.rows_apart(x):
                found = _Products.apply(self, x, weight, gathered, heads)
            else:
                found = [_product(x, part, heads) for part in self._cut(gathered)]
            if bias is None:
                return tuple(found)
            biases = bias.view(self.parts, *(() if heads is None else (heads, 1)), -1)
            return tuple(y + b for y, b in zip(found, biases.unbind(0), strict=True))

    def _cut(self, gathered: Tensor) -> Sequence[Tensor]:
        """The weight of each part, split as it is used; its gradient as its share is stored."""
        if self.parts == 1:
            return [gathered]
        parts = gathered.chunk(self.parts)
        return [annotated(part, self._part, self._part_stored) for part in parts]

    def _by_features(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        note = self.partition.annotation
        features = note((*self._rows, *(None,) * (x.dim() - 2), self._features))
        y = _FewRows.apply(self, annotated(x, note(self._rows), self._batch), weight)
        y = y if bias is None else y + bias
        y = annotated(y, features, features)
        return annotated(y, self._batch, self._batch).chunk(self.parts, dim=-1)

    def few_rows_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Of few rows: what each device's features add to it goes to the rows' own device, and is
        summed there in float32.
        """
        note = self.partition.annotation
        features, rows = self._features, self._rows[0]
        parts = weight.unflatten(0, (self.partition.size(features), -1))
        terms = torch.einsum("rnf,nfi->nri", gradient.unflatten(-1, parts.shape[:2]), parts)
        sent = note((None, self.partition.batch))(note((features, rows))(terms))
        return sent.float().sum(0).to(gradient.dtype)

    def stored_gradient(self, gradients: Sequence[Tensor], x: Tensor, heads: int | None) -> Tensor:
        """Of the weight, from the gradients of what each part returned."""
        if self.partition.tracing():
            later: Tensor = _gradient_later(self._number, list(gradients), x, heads or 0)
            return later
        return self.stored_gradient_now(gradients, x, heads)

    def stored_gradient_now(
        self, gradients: Sequence[Tensor], x: Tensor, heads: int | None
    ) -> Tensor:
        """The same, of tensors that have content."""
        partition, turned = self.partition, self.turned
        rows = partition.own_rows(x)
        sums = [
            partition.sum_scattered(
                _weight_gradient(partition.own_rows(gradient), rows, heads, turned)
            )
            for gradient in gradients
        ]
        if turned:
            return self.as_stored(partition.whole(torch.cat(sums, 1).t(), (None, "fsdp")))
        return self.as_stored(partition.whole(torch.cat(sums), ("fsdp", None)))


_USES: list[LinearUse] = []
"""By their numbers: a graph can hold no other name of theirs."""


@torch.library.custom_op("rae_xla::weight_gradient", mutates_args=())
def _gradient_later(use: int, gradients: list[Tensor], x: Tensor, heads: int) -> Tensor:
    """An operation of its own, which the graph of a loop over blocks (``xla_scan``) can hold."""
    return _USES[use].stored_gradient_now(gradients, x, heads or None)


@_gradient_later.register_fake
def _(use: int, gradients: list[Tensor], x: Tensor, heads: int) -> Tensor:
    features = sum(g.shape[-1] * (heads or 1) for g in gradients)
    return x.new_empty(features, x.shape[-1])


class _FewRows(torch.autograd.Function):
    """A product whose features are split over the devices, as its weight is."""

    @staticmethod
    def forward(ctx: Any, use: LinearUse, x: Tensor, weight: Tensor) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        with torch.autocast(x.device.type, enabled=False):
            rows = gradient.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                of_x = ctx.use.few_rows_gradient(rows, weight).view(x.shape)
            if ctx.needs_input_grad[2]:
                of_weight = ctx.use.as_stored(torch.einsum("ro,ri->oi", rows, x.flatten(0, -2)))
        return None, of_x, of_weight


class _Products(torch.autograd.Function):
    """The product with each part of a gathered weight; the weight's gradient is scattered."""

    @staticmethod
    def forward(
        ctx: Any, use: LinearUse, x: Tensor, weight: Tensor, gathered: Tensor, heads: int | None
    ) -> tuple[Tensor, ...]:
        ctx.use, ctx.heads = use, heads
        ctx.save_for_backward(x, gathered)
        return tuple(_product(x, part, heads) for part in gathered.chunk(use.parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered = ctx.saved_tensors
        use, heads = ctx.use, ctx.heads
        of_x = of_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                parts = zip(gradients, gathered.chunk(use.parts), strict=True)
                terms = [_input_gradient(gradient, part, heads) for gradient, part in parts]
                of_x = functools.reduce(torch.add, terms)
            if ctx.needs_input_grad[2]:
                of_weight = use.stored_gradient(gradients, x, heads)
        return None, of_x, of_weight, None, None


# Sums over named dimensions: whatever order the result has, it costs no copy.


def _product(x: Tensor, weight: Tensor, heads: int | None) -> Tensor:
    if heads is not None:
        return torch.einsum("bli,hdi->bhld", x, weight.unflatten(0, (heads, -1)))
    rows = _rows(x)
    return torch.einsum(f"{rows}i,oi->{rows}o", x, weight)


def _input_gradient(gradient: Tensor, weight: Tensor, heads: int | None) -> Tensor:
    if heads is not None:
        return torch.einsum("bhld,hdi->bli", gradient, weight.unflatten(0, (heads, -1)))
    rows = _rows(gradient)
    return torch.einsum(f"{rows}o,oi->{rows}i", gradient, weight)


def _weight_gradient(gradient: Tensor, x: Tensor, heads: int | None, turned: bool) -> Tensor:
    """(out, in), or turned (in, out)."""
    if heads is not None:
        found = torch.einsum("bhld,bli->" + ("ihd" if turned else "hdi"), gradient, x)
        return found.flatten(1) if turned else found.flatten(0, 1)
    rows = _rows(x)
    return torch.einsum(f"{rows}o,{rows}i->" + ("io" if turned else "oi"), gradient, x)


def _rows(x: Tensor) -> str:
    return "abcdefgh"[: x.dim() - 1]


def _axes(entry: Entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
