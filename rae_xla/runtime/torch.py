"""The plain torch backend: one CPU or CUDA device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.runtime.interface import Batch, Fn
from rae_xla.runtime.mesh import MeshShape, resolve_mesh


class TorchRuntime:
    """See ``Runtime``. Everything runs eagerly unless ``compile_graphs`` asks for torch.compile."""

    backend = "torch"
    process_index = 0
    process_count = 1

    def __init__(
        self, *, data: int, fsdp: int, precision: str, compile_graphs: bool, seed: int
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mesh: MeshShape = resolve_mesh(data, fsdp, devices=1)
        self._precision = precision
        if precision == "fp32":  # cuDNN's default for convolutions is TF32, of 10 bits
            torch.backends.cudnn.allow_tf32 = False
        self._compile = compile_graphs
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        self.description = f"1 torch device ({name}), {precision}"
        torch.manual_seed(seed)

    def place(self, module: nn.Module) -> nn.Module:
        """Move the module to the device."""
        return module.to(self.device)

    def place_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move the tensors to the device."""
        return {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}

    def put(self, batch: Mapping[str, Tensor]) -> Batch:
        """Move a batch to the device; from pinned memory the copy overlaps what runs there."""
        if self.device.type == "cpu":
            return dict(batch)
        return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}

    def compile(self, fn: Fn) -> Fn:
        """torch.compile where the configuration asks for it."""
        return torch.compile(fn) if self._compile else fn  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        if self._precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU."""
        return [result.cpu() for result in results]

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def synchronize(self) -> None:
        """Wait for the CUDA stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def exchange(self, text: str) -> list[str]:
        """This process is alone."""
        return [text]

    def compilations(self) -> int:
        """Graphs made by torch.compile."""
        if not self._compile:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def fallbacks(self) -> dict[str, int]:
        """None: every operation runs where its tensors are."""
        return {}
