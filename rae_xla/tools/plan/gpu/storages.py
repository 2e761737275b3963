"""Count of the memory, traffic and communication of a step, operation by operation.

``StepCounter`` follows every storage from its allocation until it is freed, as the allocator of a
device does: on fake tensors, which stand for any size, as well as on real ones. Memory that a
kernel uses while it runs is not visible to it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rae_xla.runtime.torch.compat import Collective, as_collective
from rae_xla.tools.plan.gpu.compat import (
    TorchDispatchMode,
    is_mutable,
    is_plain,
    is_view,
    resizes_reported,
    tensors_in,
)
from rae_xla.tools.plan.gpu.op_flops import operation_flops

OTHER = "activations, gradients and temporaries"

ALIGNMENT = 512
"""Bytes to which CUDA's caching allocator rounds up every allocation (CUDACachingAllocator.cpp)."""


@dataclass
class Totals:
    """What the operations since the last ``StepCounter.begin`` amount to.

    Attributes:
        peak: largest number of bytes that were allocated at the same time.
        peak_by_kind: its parts.
        flops: of matrix products, convolutions and attention; a multiply-add counts as two.
        product_bytes: bytes that those read and write.
        other_bytes: bytes that all other operations read and write.
        operations: number of operations that compute something.
        sent: by (kind, group): number, and bytes that each process sends.
    """

    peak: int = 0
    peak_by_kind: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    product_bytes: int = 0
    other_bytes: int = 0
    operations: int = 0
    sent: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)


@dataclass
class _Storage:
    reference: weakref.ref[torch.UntypedStorage]
    size: int
    kind: str


class StepCounter(TorchDispatchMode):
    """A context that counts the operations in it.

    Enter it after the context of fake tensors, if there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.totals = Totals()
        self._live: Counter[str] = Counter()
        self._live_bytes = 0
        self._storages: dict[int, _Storage] = {}
        self._exit = ExitStack()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Allow ``torch.compile`` in the context; compiled functions are counted when they run."""
        return True

    def __enter__(self) -> StepCounter:
        self._exit.enter_context(resizes_reported(self._resized))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exit.close()

    def begin(self) -> None:
        """Start to count at zero; storages that exist stay allocated."""
        self.totals = Totals()
        self._note_peak()

    def label(self, kind: str, tensors: Iterable[Tensor]) -> int:
        """Set the kind of the storages of tensors; returns their bytes."""
        total = 0
        for tensor in tensors:
            storage = self._add(tensor.untyped_storage(), kind)
            self._live[storage.kind] -= storage.size
            storage.kind = kind
            self._live[kind] += storage.size
            total += storage.size
        return total

    @property
    def live(self) -> dict[str, int]:
        """Bytes that are allocated now, by kind."""
        return {kind: size for kind, size in self._live.items() if size}

    @torch.compiler.disable  # a compiled function calls this between its graphs
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if not is_plain(types):
            return NotImplemented  # it is called again with the tensors that it consists of
        collective = as_collective(func, args)
        result = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        for tensor in inputs:
            self._add(tensor.untyped_storage(), OTHER)
        for tensor in outputs:
            self._add(tensor.untyped_storage(), OTHER)
        if collective is not None:
            self._count_collective(collective)
        elif outputs and not (is_view(func) and not is_mutable(func)):
            self._count_computation(func, args, kwargs, result, [*inputs, *outputs])
        return result

    def _count_computation(
        self, func: Any, args: Any, kwargs: Any, result: Any, tensors: list[Tensor]
    ) -> None:
        totals = self.totals
        totals.operations += 1
        size = sum(t.numel() * t.element_size() for t in tensors)
        if flops := operation_flops(func, args, kwargs, result):
            totals.flops += flops
            totals.product_bytes += size
        else:
            totals.other_bytes += size

    def _count_collective(self, collective: Collective) -> None:
        key = collective.kind, collective.ranks
        count, size = self.totals.sent.get(key, (0, 0))
        self.totals.sent[key] = count + 1, size + collective.bytes_sent

    def _add(self, storage: torch.UntypedStorage, kind: str) -> _Storage:
        key = id(storage)
        found = self._storages.get(key)
        if found is None:
            found = _Storage(weakref.ref(storage, lambda _: self._freed(key)), 0, kind)
            self._storages[key] = found
            self._set_size(found, storage.nbytes())
        return found

    def _resized(self, storage: torch.UntypedStorage) -> None:
        found = self._storages.get(id(storage))
        if found is not None:
            self._set_size(found, storage.nbytes())

    def _freed(self, key: int) -> None:
        found = self._storages.pop(key, None)
        if found is not None:
            self._set_size(found, 0)

    def _set_size(self, storage: _Storage, size: int) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        change = size - storage.size
        storage.size = size
        self._live[storage.kind] += change
        self._live_bytes += change
        if change > 0:
            self._note_peak()

    def _note_peak(self) -> None:
        if self._live_bytes > self.totals.peak:
            self.totals.peak = self._live_bytes
            self.totals.peak_by_kind = self.live
