"""Flash attention on TPU: the weights of long rows of tokens never leave the chip.

The kernels are jax's (splash attention in Pallas, after Dao et al. 2022). jax lowers them to
computations of XLA, which become a part of torch_xla's graph; nothing runs in jax. The partitioner
cannot split a kernel: each device is given the rows and heads it has.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.attention import KERNELS
from rae_xla.runtime.mesh import BATCH, MeshShape
from rae_xla.runtime.sharding import shard_count, without_single_axes

LONG = 1024
"""Tokens from which ``runtime.attention: auto`` takes the kernels."""

JAX = "0.7.1"
"""The version whose kernels these are: the one torch_xla 2.9 is made with."""


def tokens_from(setting: str, precision: str, *, tpu: bool) -> int | None:
    """The number of tokens from which attention is done by the kernels; None: never.

    Args:
        setting: ``runtime.attention``.
        precision: ``runtime.precision``.
        tpu: whether the run computes on TPUs.

    Raises:
        UserError: the kernels are asked for and cannot be had.
    """
    lacking = ""
    if not tpu:
        lacking = "its kernels run on TPUs alone, and this machine has none"
    elif _version("jax") != JAX:
        lacking = f"its kernels need jax {JAX}, not {_version('jax')}: pip install jax=={JAX}"
    elif precision != "bf16":
        lacking = f"its kernels multiply in bf16, and runtime.precision is {precision}"
    if setting == "flash" and lacking:
        raise UserError(f"runtime.attention is flash, but {lacking} (or set it to auto)")
    if setting == "plain" or lacking:
        return None
    return 0 if setting == "flash" else LONG


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class FlashAttention:
    """Attention by the kernels for one mesh. There is one in a process: see ``use_flash``.

    Args:
        mesh: of the run, and ``shape`` of it.
        least: tokens below which attention is left to others.
        interpret: run the kernels' arithmetic on a CPU, for tests.
    """

    def __init__(
        self, mesh: xs.Mesh, shape: MeshShape, least: int, *, interpret: bool = False
    ) -> None:
        from rae_xla.runtime import xla_flash_kernels

        self.kernels = xla_flash_kernels
        self._mesh, self._least, self._interpret = mesh, least, interpret
        self._split = without_single_axes((BATCH, "tensor"), shape.axis_sizes)
        self._parts = [shard_count(entry, shape.axis_sizes) for entry in self._split]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """softmax(q kᵀ / √d) v for (B, heads, N, d) tensors of one dtype -> (B, heads, N, d), or
        None where N is small, not a multiple of 128, or of two lengths, or where batch and heads do
        not divide evenly.
        """
        tokens = query.shape[2]
        even = all(size % n == 0 for size, n in zip(query.shape, self._parts, strict=False))
        if tokens < self._least or tokens % self.kernels.LANES or not even:
            return None
        if key.shape != query.shape or value.shape != query.shape:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            mixed: Tensor = _Flash.apply(query, key, value)
            return mixed
        return _forward(query, key, value, False)[0]

    def run(self, function: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A function of the kernels' module on what each device has of tensors."""
        if any(self._split):
            tensors = [self._of_device(tensor) for tensor in tensors]
        computation = self.kernels.computation(function, tensors, self._interpret)
        found = torch_xla._XLAC._xla_user_computation("rae_xla::flash", tensors, computation)
        return [self._of_all(tensor) if any(self._split) else tensor for tensor in found]

    def _sharding(self, dimensions: int) -> Any:
        return self._mesh.get_op_sharding(self._split + (None,) * (dimensions - len(self._split)))

    def _of_device(self, tensor: Tensor) -> Tensor:
        """As ``xs.enable_manual_sharding``, but the tensor it is given stays as it is."""
        own = tensor.clone()
        torch_xla._XLAC._xla_annotate_custom_sharding(own, self._sharding(tensor.dim()))
        shard: Tensor = torch_xla._XLAC._spmd_full_to_shard_shape(own)
        return shard

    def _of_all(self, shard: Tensor) -> Tensor:
        parts = [*self._parts, *(1 for _ in shard.shape[len(self._parts) :])]
        shape = [size * n for size, n in zip(shard.shape, parts, strict=True)]
        own = xs.xla_sharding._mark_manual_sharding(shard).global_tensor
        whole: Tensor = torch_xla._XLAC._spmd_shard_to_full_shape(
            own, self._sharding(shard.dim()), shape, shard.dtype
        )
        return whole


def use_flash(flash: FlashAttention | None) -> None:
    """Let every attention on XLA devices be done by the kernels, where they can; or no more."""
    KERNELS.pop("xla", None)
    _Flash.in_use = flash
    if flash is not None:
        KERNELS["xla"] = flash


class _Flash(torch.autograd.Function):
    in_use: FlashAttention | None = None

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed, log_sums = _forward(query, key, value, True)
        ctx.save_for_backward(query, key, value, mixed, log_sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(_backward(*ctx.saved_tensors, gradient))


# Operations of their own, which the graph of a loop over blocks (``xla_scan``) can hold. What is no
# tensor and no number cannot be their argument: the kernels are those in use.


@torch.library.custom_op("rae_xla::flash_forward", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, training: bool) -> list[Tensor]:
    """What attention gives, and in training the logarithms of the sums of the weights."""
    flash = _Flash.in_use
    assert flash is not None
    function = flash.kernels.forward if training else flash.kernels.result
    return flash.run(function, [query, key, value])


@torch.library.custom_op("rae_xla::flash_backward", mutates_args=())
def _backward(
    query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, log_sums: Tensor, gradient: Tensor
) -> list[Tensor]:
    flash = _Flash.in_use
    assert flash is not None
    return flash.run(flash.kernels.backward, [query, key, value, mixed, log_sums, gradient])


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, training: bool) -> list[Tensor]:
    mixed = torch.empty_like(query)
    log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return [mixed, log_sums] if training else [mixed]


@_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, log_sums: Tensor, gradient: Tensor
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (query, key, value)]
