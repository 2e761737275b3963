"""Copies from the host to a device, counted with tensors on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostCopies(TorchDispatchMode):
    """Records the shape of every tensor that is copied from the CPU to another device.

    On CUDA such a copy from ordinary memory makes the host wait until the device has finished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source: torch.Tensor = args[1] if name == "copy_" else args[0]
            if source.device.type == "cpu" != result.device.type:
                self.shapes.append(tuple(source.shape))
        return result
