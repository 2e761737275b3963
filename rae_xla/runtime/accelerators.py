"""Accelerators: which one PyTorch uses, and the peak performance of the known kinds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

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


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture). GPUs: the data sheets and
# architecture white papers of NVIDIA and AMD, in bf16 accumulated in float32, without sparsity,
# which doubles the numbers printed there. Cards without bf16 units (V100, T4) are left out. The
# first matching pattern decides; variants with other chips (Laptop, D) must not match.
_KNOWN = (
    (r"^v4\b", Accelerator("TPU v4", 275e12, 32 * GB)),
    (r"^v5(e|lite)", Accelerator("TPU v5e", 197e12, 16 * GB)),
    (r"^v5p", Accelerator("TPU v5p", 459e12, 95 * GB)),
    (r"^v6e", Accelerator("TPU v6e", 918e12, 32 * GB)),
    (r"\bGB200\b", Accelerator("GB200", 2500e12, 186 * GB)),
    (r"\bB200\b", Accelerator("B200", 2250e12, 180 * GB)),
    (r"\bGH200\b", Accelerator("GH200", 989e12, 96 * GB)),
    (r"\bH200 NVL\b", Accelerator("H200 NVL", 835e12, 141 * GB)),
    (r"\bH200\b", Accelerator("H200", 989e12, 141 * GB)),
    (r"\bH100 NVL\b", Accelerator("H100 NVL", 835e12, 94 * GB)),
    (r"\bH100 PCIe", Accelerator("H100 PCIe", 756e12, 80 * GB)),
    (r"\bH100 80GB HBM3", Accelerator("H100 SXM", 989e12, 80 * GB)),
    (r"\bH800\b(?! PCIe)", Accelerator("H800 SXM", 989e12, 80 * GB)),
    (r"\bH20\b", Accelerator("H20", 148e12, 96 * GB)),
    (r"\b(A100|A800)\b.*80GB", Accelerator("A100 80 GB", 312e12, 80 * GB)),
    (r"\bA100\b", Accelerator("A100 40 GB", 312e12, 40 * GB)),
    (r"\bA40$", Accelerator("A40", 149.7e12, 48 * GB)),
    (r"\bA30$", Accelerator("A30", 165e12, 24 * GB)),
    (r"\bA10$", Accelerator("A10", 125e12, 24 * GB)),
    (r"\bA10G$", Accelerator("A10G", 70e12, 24 * GB)),
    (r"\bL40S$", Accelerator("L40S", 362e12, 48 * GB)),
    (r"\bL40$", Accelerator("L40", 181e12, 48 * GB)),
    (r"\bL4$", Accelerator("L4", 121e12, 24 * GB)),
    (r"\bRTX 6000 Ada Generation$", Accelerator("RTX 6000 Ada", 364.2e12, 48 * GB)),
    (r"\bRTX A6000$", Accelerator("RTX A6000", 154.8e12, 48 * GB)),
    (r"\bRTX 5090$", Accelerator("RTX 5090", 209.5e12, 32 * GB)),
    (r"\bRTX 5080$", Accelerator("RTX 5080", 112.6e12, 16 * GB)),
    (r"\bRTX 4090$", Accelerator("RTX 4090", 165.2e12, 24 * GB)),
    (r"\bRTX 4080$", Accelerator("RTX 4080", 97.5e12, 16 * GB)),
    (r"\bRTX 3090$", Accelerator("RTX 3090", 71e12, 24 * GB)),
    (r"\bMI300X\b", Accelerator("MI300X", 1307.4e12, 192 * GB)),
)

# Devices of NVIDIA's kernel driver; it is loaded if this folder exists.
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

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


def unused_accelerator() -> str | None:
    """Return why PyTorch cannot use the NVIDIA GPUs of this machine; None if it can, or has none.

    PyTorch itself continues on the CPU without a word: if it was built without CUDA, if the driver
    is too old for it, and if the driver does not respond. An empty ``CUDA_VISIBLE_DEVICES`` says
    that the GPUs are not to be used.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1") or not _NVIDIA_GPUS.exists():
        return None
    if torch.version.cuda is None:
        build = "for ROCm" if torch.version.hip else "without CUDA"
        return f"this PyTorch ({torch.__version__}) was built {build}"
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0]
    return "its driver finds no GPU"


def torch_device_name(device: torch.device) -> str:
    """Return the driver's name of a device, such as ``NVIDIA H200``; ``CPU`` for the CPU.

    ``torch.accelerator`` has no function for it; the module of a device type (``torch.cuda``,
    ``torch.xpu``) usually has one.
    """
    if device.type == "cpu":
        return "CPU"
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if get_name is None else str(get_name(device))
