"""Private APIs of torch 2.9.1 that counting a step without a GPU needs."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "fake_tensors", "is_plain", "tensors_in"]


class _FakeMode(FakeTensorMode):
    """A mode that copies of its tensors share; otherwise ``copy.deepcopy`` would copy it too."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _FakeMode:
        return self


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Enter a context in which tensors have shapes and storages, but no memory and no values.

    They are on the CPU. ``Module.to`` cannot exchange fake parameters that something refers to
    weakly, and has nothing to do here, so it returns the module.
    """
    original = nn.Module.to
    cast("Any", nn.Module).to = lambda module, *_, **__: module
    try:
        with _FakeMode(allow_non_fake_inputs=True):
            yield
    finally:
        cast("Any", nn.Module).to = original


def is_plain(types: tuple[type, ...]) -> bool:
    """Return whether an operation has no arguments of a class that dispatches to other tensors."""
    return not any(cls.__name__ in ("DTensor", "AsyncCollectiveTensor") for cls in types)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_mutable(func: Any) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return bool(func._schema.is_mutable)


def is_view(func: Any) -> bool:
    """Return whether the result of an operation shares the memory of an argument."""
    return any(value.alias_info is not None for value in func._schema.returns)


@contextmanager
def resizes_reported(report: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call ``report`` after every resize of a storage in the context.

    FSDP2 frees the gathered weights of a block by resizing their storage to 0 bytes, which is not
    an operation that a dispatch mode receives.
    """
    original = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        report(storage)
        return result

    cast("Any", torch.UntypedStorage).resize_ = resize
    try:
        yield
    finally:
        cast("Any", torch.UntypedStorage).resize_ = original


@contextmanager
def cuda_autocast_rules() -> Iterator[None]:
    """Let autocast on the CPU compute layer norms in float32, as autocast on CUDA does."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("layer_norm", _layer_norm_in_float32, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _layer_norm_in_float32(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        return torch.layer_norm(x.float(), shape, weight, bias, eps, cudnn_enable)


@contextmanager
def compiled_without_kernels() -> Iterator[None]:
    """Let ``torch.compile`` divide functions into forward and backward graphs, and run those.

    The division is that of the default compiler (a minimum cut between what the forward pass
    stores and what the backward pass computes again); the operations of a graph are not fused.
    """
    original = torch.compile
    cast("Any", torch).compile = functools.partial(original, backend=_divide)
    try:
        yield
    finally:
        cast("Any", torch).compile = original
        torch.compiler.reset()


def forget_example_values() -> None:
    """Drop the tensors that compiled graphs keep from their compilation.

    The nodes of a graph refer to its first inputs, such as the gradients of the first step. These
    are fake tensors of the graph's own if the inputs are real, but the inputs themselves if they
    are fake; a second step would then be counted with the gradients of two.
    """
    for value in gc.get_objects():
        if type(value) is torch.fx.Node:
            value.meta.clear()


def _divide(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph in the fake mode of its inputs, of which it may have only one."""
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    context = torch._guards.TracingContext.get()
    modes = [t.fake_mode for t in inputs if isinstance(t, FakeTensor)]
    mode, context.fake_mode = context.fake_mode, modes[0] if modes else context.fake_mode
    try:
        return cast("Callable[..., Any]", aot_eager_decomp_partition(graph, inputs))
    finally:
        context.fake_mode = mode
