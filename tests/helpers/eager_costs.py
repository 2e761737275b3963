"""What eager operations cost on an accelerator, counted on the CPU: launches, traffic, memory."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Tensors per launch of a multi-tensor kernel by the number of its lists, and elements per launch:
# blocks times the elements of each (ATen/native/cuda/MultiTensorApply.cuh).
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_ELEMENTS_PER_LAUNCH = 320 * 65536

_ONLY_WRITES = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")


class EagerCosts(TorchDispatchMode):
    """Counts the operations within the context.

    Attributes:
        launches: kernels that a CUDA device would run.
        moved: bytes that they read and write.
        peak: most bytes of tensors that were made in the context and alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        read, written = _traffic(func, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in (*read, *written)}
        new = [t for t in made if t.untyped_storage().data_ptr() not in given]
        for tensor in new:
            self._allocate(tensor)
        if (new or written) and func.overloadpacket.__name__ not in ("empty", "empty_like"):
            self.launches += _launches(func, args)
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *written, *new))
        return result

    def _allocate(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer and pointer not in self._live:
            self._live[pointer] = storage.nbytes()
            self.peak = max(self.peak, sum(self._live.values()))
            weakref.finalize(storage, self._live.pop, pointer, None)


def _traffic(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that an operation reads and those that it writes in place."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        only_written = is_written and (
            argument.kwarg_only or func.overloadpacket.__name__ in _ONLY_WRITES
        )
        if not only_written:
            read += tensors
    return read, written


def _launches(func: Any, args: tuple[Any, ...]) -> int:
    lists = [
        of for of in args if isinstance(of, (list, tuple)) and of and isinstance(of[0], Tensor)
    ]
    if not func.overloadpacket.__name__.startswith(("_foreach", "_fused")):
        return 1
    tensors = _TENSORS_PER_LAUNCH[min(5, max(1, len(lists)))]
    elements = sum(tensor.numel() for tensor in lists[0])
    return max(-(-len(lists[0]) // tensors), -(-elements // _ELEMENTS_PER_LAUNCH))
