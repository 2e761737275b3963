"""What the rest of the system may ask of the machine it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rae_xla.runtime.chips import Chip, Memory
from rae_xla.runtime.mesh import MeshShape
from rae_xla.runtime.snapshot import HostTensor

Fn = TypeVar("Fn", bound=Callable[..., Any])
Batch = dict[str, Tensor]


class Runtime(Protocol):
    """One backend, started. Code that is given one never asks which."""

    backend: str
    """``xla`` or ``torch``."""
    device: torch.device
    """Where tensors of this process live."""
    description: str
    """For people: "4 XLA devices (CPU), mesh data=1 x fsdp=4, fp32"."""
    mesh: MeshShape
    process_index: int
    process_count: int

    @property
    def on_cpu(self) -> bool:
        """Whether its devices are this machine's processor, plain or as XLA's virtual devices."""
        ...

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the devices, its parameters split by the sharding rules.

        Parameter objects are replaced, and those of blocks that are alike may become one: build
        optimizers afterwards.
        """
        ...

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Put host tensors on the devices as the parameters of a placed module are: so split, so
        called and in that order. Their names are those from before it was placed.
        """
        ...

    def put(self, batch: Mapping[str, Tensor]) -> Batch:
        """Move this process's host batch to the devices, without waiting for them.

        Tensors with rows are split over the mesh by rows; 0-d tensors are copied to every device.
        """
        ...

    def compile(self, fn: Fn) -> Fn:
        """Make a function of tensors run as one graph; it may update tensors in place."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision the run asked for, as an autocast context."""
        ...

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Of means over the rows a step was given, the means over the global batch."""
        ...

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What backward passes left, averaged over the global batch; zeros where that is nothing.
        Each is split as its parameter is.
        """
        ...

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all elements of tensors that may be split, 0-d."""
        ...

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of each, in the same memory: arithmetic on elements, done to the
        parts in every process, is done to the whole.
        """
        ...

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Small unsplit results of compiled functions, on the CPU. Waits for those alone, so what
        was asked for since then goes on.
        """
        ...

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a small unsplit result of a compiled function to the CPU. What is returned
        gives the copy; it waits for that result, not for what was asked for since.
        """
        ...

    def own_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begin to copy to the CPU what this process's devices hold of rows that were ``put`` or
        computed from such; nothing goes from process to process. What is returned gives the copies:
        equally many rows of each, in one order.
        """
        ...

    def beside(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """What is asked for inside need not be done before what is asked for afterwards. It may use
        ``inputs``, which are there already, and models.
        """
        ...

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of every process, by the names from before modules were placed:
        of what was computed from ``put`` rows, the rows of all processes in their order. Waits for
        the devices to finish.
        """
        ...

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Copies on the CPU of what this process is to write of each tensor, by the names from
        before modules were placed. Waits for the devices and for the copies; afterwards the tensors
        may change.
        """
        ...

    def saving_group(self) -> Any | None:
        """A new process group for checkpoints, whose threads talk while training does; all must
        call it. None for a process that is alone.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the devices have done all they were asked."""
        ...

    def exchange(self, text: str) -> list[str]:
        """Every process's ``text``, by process; all must call it. Waits for the slowest."""
        ...

    def compilations(self) -> int:
        """How many graphs this process has compiled so far (0 where nothing compiles)."""
        ...

    def fallbacks(self) -> dict[str, int]:
        """Operations that left the device and ran on the host, and how often."""
        ...

    def chip(self) -> Chip | None:
        """The kind of its devices, where their peak is known."""
        ...

    def memory(self) -> Memory | None:
        """Of the devices of this process; None where nobody counts it."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[None]:
        """Record what host and devices do meanwhile, as files in ``folder`` that TensorBoard
        reads.
        """
        ...

    def warnings(self) -> list[str]:
        """What has turned out so far that a user should know of."""
        ...
