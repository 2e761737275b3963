"""What a chip can do at most, by the name its driver gives it."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """One accelerator chip.

    Attributes:
        name: for people.
        peak_flops: dense bf16 FLOP/s; a multiply-add is two.
        hbm_bytes: of its memory.
    """

    name: str
    peak_flops: float
    hbm_bytes: int


@dataclass(frozen=True)
class Memory:
    """Of the device of this process that uses most, in bytes.

    Attributes:
        used: now.
        peak: at most, since the process began; None where nobody counts it.
        total: there are; None where nobody says it.
    """

    used: int
    peak: int | None
    total: int | None


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture). GPUs: NVIDIA's data
# sheets, without sparsity, which doubles the figures printed there. The first pattern that is found
# decides.
_CHIPS = (
    (r"^v4\b", Chip("TPU v4", 275e12, 32 * GB)),
    (r"^v5(e|lite)", Chip("TPU v5e", 197e12, 16 * GB)),
    (r"^v5p", Chip("TPU v5p", 459e12, 95 * GB)),
    (r"^v6e", Chip("TPU v6e", 918e12, 32 * GB)),
    (r"\bH200\b", Chip("H200", 989e12, 141 * GB)),
    (r"\bH100 PCIe", Chip("H100 PCIe", 756e12, 80 * GB)),
    (r"\bH100 80GB HBM3", Chip("H100 SXM", 989e12, 80 * GB)),
    (r"\bA100\b.*80GB", Chip("A100 80 GB", 312e12, 80 * GB)),
    (r"\bA100\b", Chip("A100 40 GB", 312e12, 40 * GB)),
)


def known_chip(name: str) -> Chip | None:
    """The chip of a name such as ``v5litepod-16`` or ``NVIDIA H100 80GB HBM3``; None if unknown."""
    return next((chip for pattern, chip in _CHIPS if re.search(pattern, name)), None)
