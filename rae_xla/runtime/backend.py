"""The interface of a backend: everything the rest of the system needs from the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rae_xla.runtime.accelerators import Accelerator, Memory
from rae_xla.runtime.mesh import MeshShape
from rae_xla.runtime.snapshot import HostPart, HostTensor

Fn = TypeVar("Fn", bound=Callable[..., Any])
Batch = dict[str, Tensor]
"""Tensors of one batch by name: rows along the first dimension, or 0-d inputs of the step."""


class Backend(Protocol):
    """A backend that has been started. Code that uses one does not depend on which it is."""

    name: str
    """``xla`` or ``torch``."""
    device: torch.device
    """Device of this process's tensors."""
    description: str
    """For display: "4 XLA devices (CPU), mesh data=1 x fsdp=4, fp32"."""
    mesh: MeshShape
    process_index: int
    process_count: int

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are this machine's CPU, including XLA's virtual CPU devices."""
        ...

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the devices and shard its parameters by the sharding rules.

        Parameter objects are replaced, and those of identical blocks may be stacked into one:
        build optimizers afterwards. Parameters that are on the devices already stay unchanged.

        Args:
            module: on the CPU, the same on every process.

        Returns:
            The module.
        """
        ...

    def own_parts(self, module: nn.Module) -> dict[str, HostPart]:
        """Return which part of each parameter this process will hold once it is placed.

        Args:
            module: not placed yet.

        Returns:
            By the name of the parameter; those that are missing are needed in full.
        """
        ...

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Move host tensors to the devices, sharded like the parameters of a placed module.

        Args:
            tensors: by the names that the parameters had before the module was placed.
            like: the placed module.

        Returns:
            New tensors, in the order and by the names of the placed parameters.
        """
        ...

    def shard_batch(self, batch: Mapping[str, Tensor]) -> Batch:
        """Move this process's rows of a batch to the devices, without waiting for the transfer.

        Args:
            batch: tensors (B / processes, ...), which are split over the mesh by rows, and 0-d
                tensors, which are replicated.
        """
        ...

    def compile(self, fn: Fn) -> Fn:
        """Return a function that runs as one compiled graph where the backend compiles.

        Args:
            fn: takes and returns tensors; it may update tensors in place.
        """
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return an autocast context of the configured precision."""
        ...

    def full_float32(self) -> AbstractContextManager[Any]:
        """Return a context in which products of fp32 tensors are computed in fp32.

        Accelerators may otherwise round their operands first, TPUs to bf16 and GPUs to TF32. A
        compiled function that needs it must be called inside the context every time.
        """
        ...

    def global_mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Average values that a step computed as means over its rows over the global batch."""
        ...

    def global_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of parameters, averaged over the global batch.

        Returns:
            A gradient for each parameter, sharded like it; zeros where there is none.
        """
        ...

    def global_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all elements of tensors, which may be sharded, as 0-d tensor."""
        ...

    def local_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return this process's shard of each tensor, in the same memory.

        An elementwise update of the shards in every process updates the full tensors.
        """
        ...

    def shard_dimensions(self, tensors: Sequence[Tensor]) -> list[int | None]:
        """Return the dimension along which ``local_shards`` returns a part of each tensor.

        None: it returns all of the tensor.
        """
        ...

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Apply a function to matrices, each of which is computed by one device if possible.

        Args:
            function: of a stack of complete matrices (n, rows, columns), each independent of the
                others; of the same shape. A matrix of zeros stays zero.
            stack: (n, rows, columns), as far as this process holds it.
            dimension: along which it is sharded, 1 or 2; None: the matrices are complete.

        Returns:
            The result, sharded like ``stack``.
        """
        ...

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copy small replicated results of compiled functions to the CPU.

        Waits until the results are computed, not for work that was submitted after them.
        """
        ...

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Start to copy a small replicated result of a compiled function to the CPU.

        Returns:
            A function that returns the copy. It waits until the result is computed, not for work
            that was submitted after it.
        """
        ...

    def local_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to copy the rows on this process's devices to the CPU, without communication.

        Args:
            tensors: results of ``shard_batch``, or computed from them row by row.

        Returns:
            A function that waits for the copies and returns them: the same rows of every tensor,
            in the same order.
        """
        ...

    def side_stream(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Return a context whose work need not finish before work that is submitted after it.

        Args:
            inputs: tensors that the work reads; they must exist before the context is entered.
        """
        ...

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy full tensors to the CPU of every process; waits for the devices.

        Args:
            tensors: parameters and results by name. Rows are gathered from all processes, in the
                order of the processes.

        Returns:
            The copies, by the names from before modules were placed.
        """
        ...

    def to_host_later(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start to copy full tensors to the CPU of every process.

        Args:
            tensors: as for :meth:`to_host`; all processes start the same copies in the same order.

        Returns:
            A function that returns the copies. Where devices allow it, it does not wait for work
            that was submitted after them.
        """
        ...

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Copy the shards that this process writes to a checkpoint to the CPU.

        Waits for the devices and the copies; afterwards the tensors may change.

        Returns:
            The copies, by the names from before modules were placed.
        """
        ...

    def checkpoint_group(self) -> Any | None:
        """Create a process group for the threads that write checkpoints; all processes call it.

        Returns:
            The group, or None for a single process.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the devices have finished all submitted work."""
        ...

    def all_gather_text(self, text: str) -> list[str]:
        """Return the ``text`` of every process, by process; all processes must call it.

        Raises:
            ProcessLostError: another process ended or does not answer.
        """
        ...

    def compilations(self) -> int:
        """Return how many graphs this process has compiled; 0 where nothing is compiled."""
        ...

    def captures(self) -> int:
        """Return how many calls of compiled functions were traced to be replayed later.

        It grows while the functions of a run are called for the first two times. Afterwards only a
        new shape, or a tensor that was replaced, makes it grow. 0 where nothing is replayed.
        """
        ...

    def fallbacks(self) -> dict[str, int]:
        """Return the operations that ran on the host instead of the device, with their counts."""
        ...

    def accelerator(self) -> Accelerator | None:
        """Return the kind of the devices; None if it is unknown."""
        ...

    def memory(self) -> Memory | None:
        """Return the memory in use on the devices of this process; None if it is unknown."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Return a context that records a profile of host and devices.

        Args:
            folder: where to write it, in TensorBoard's format.
        """
        ...

    def warnings(self) -> list[str]:
        """Return what the user should know about the backend so far, a message each."""
        ...


class GlobalArithmetic:
    """Methods of a ``Backend`` whose compiled functions see the global batch and full tensors.

    That is the case under XLA's SPMD partitioner, and on a single device.
    """

    def own_parts(self, module: nn.Module) -> dict[str, HostPart]:
        """Return nothing: parameters are placed from full tensors."""
        return {}

    def global_mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Return the values: they are means over the global batch already."""
        return list(values)

    def global_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients; zeros where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def global_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all elements, 0-d."""
        return torch.nn.utils.get_total_norm(tensors)

    def local_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors: this process holds each of them in full."""
        return list(tensors)

    def shard_dimensions(self, tensors: Sequence[Tensor]) -> list[int | None]:
        """Return None for each tensor: this process holds it in full."""
        return [None] * len(tensors)

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Apply the function on this device."""
        return function(stack)
