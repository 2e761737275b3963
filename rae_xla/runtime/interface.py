"""What the rest of the system may ask of the machine it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rae_xla.runtime.mesh import MeshShape

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

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the devices, its parameters split by the sharding rules.

        Parameter objects are replaced: build optimizers afterwards.
        """
        ...

    def place_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put host tensors on the devices, split by the rules for the names they are given under
        (so optimizer state and EMA are split like the parameters they belong to).
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

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Small unsplit results of compiled functions, on the CPU. Waits for those alone, so what
        was asked for since then goes on.
        """
        ...

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of every process. Waits for the devices to finish."""
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
