"""Accelerators: which one PyTorch uses, and the peak performance of the known kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

GB = 10**9


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator device.

    Attributes:
        name: for display.
        peak_flops: dense bf16 FLOP/s; a multiply-add counts as two.
        hbm_bytes: size of its memory.
    """

    name: str
    peak_flops: float
    hbm_bytes: int


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, of the device of this process that uses most.

    Attributes:
        used: at present.
        peak: maximum since the start of the process; None where it is not counted.
        total: size of the memory; None where it is unknown.
    """

    used: int
    peak: int | None
    total: int | None


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture). GPUs: NVIDIA's data
# sheets, without sparsity, which doubles the numbers printed there. The first matching pattern
# decides.
_KNOWN = (
    (r"^v4\b", Accelerator("TPU v4", 275e12, 32 * GB)),
    (r"^v5(e|lite)", Accelerator("TPU v5e", 197e12, 16 * GB)),
    (r"^v5p", Accelerator("TPU v5p", 459e12, 95 * GB)),
    (r"^v6e", Accelerator("TPU v6e", 918e12, 32 * GB)),
    (r"\bH200\b", Accelerator("H200", 989e12, 141 * GB)),
    (r"\bH100 PCIe", Accelerator("H100 PCIe", 756e12, 80 * GB)),
    (r"\bH100 80GB HBM3", Accelerator("H100 SXM", 989e12, 80 * GB)),
    (r"\bA100\b.*80GB", Accelerator("A100 80 GB", 312e12, 80 * GB)),
    (r"\bA100\b", Accelerator("A100 40 GB", 312e12, 40 * GB)),
)

# MPS has neither float64 nor torch.distributed: runs on Apple computers use the CPU.
_UNSUPPORTED = ("mps",)


def known_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator that a driver or the TPU metadata call ``name``.

    Args:
        name: such as ``v5litepod-16`` or ``NVIDIA H100 80GB HBM3``.

    Returns:
        The accelerator, or None if it is unknown.
    """
    return next((known for pattern, known in _KNOWN if re.search(pattern, name)), None)


def torch_device(index: int = 0) -> torch.device:
    """Return a device of PyTorch's accelerator, or the CPU where there is none.

    Args:
        index: number of the device on this host.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type in _UNSUPPORTED:
        return torch.device("cpu")
    return torch.device(found.type, index)


def torch_device_name(device: torch.device) -> str:
    """Return the driver's name of a device, such as ``NVIDIA H200``; ``CPU`` for the CPU.

    ``torch.accelerator`` has no function for it; the module of a device type (``torch.cuda``,
    ``torch.xpu``) usually has one.
    """
    if device.type == "cpu":
        return "CPU"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if get_name is None else str(get_name(device))
