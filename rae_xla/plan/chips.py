"""TPU generations and the slices of them that can be rented: facts of the makers, in one table.

Bandwidths: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture). What the compiler may
use of the memory was measured with libtpu 0.0.21 (of v5p: the whole of it, not measured). Peaks are
those of ``runtime.chips``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rae_xla.errors import UserError
from rae_xla.runtime.chips import known_chip

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU generation, per chip.

    Attributes:
        name: as in a topology's name (``v6e:4x4``).
        hbm_bytes: that the compiler lets a program use.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s a chip sends over all its links together, one way.
        dcn_bandwidth: bytes/s of a host's network, per chip: between slices.
        dimensions: of its torus.
        gcloud: start of the accelerator types' names.
        cores_in_name: whether those count TensorCores, two to a chip, rather than chips.
        options: that libtpu needs to describe it without one being there.
    """

    name: str
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    dimensions: int
    gcloud: str
    cores_in_name: bool = False
    options: tuple[tuple[str, str], ...] = ()

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        chip = known_chip(self.name)
        assert chip is not None, self.name
        return chip.peak_flops


# Between slices: 25.6 Tbit/s for the 256 chips of a v6e pod, 6.4 for v5e's, 50 Gbit/s per chip of
# v5p; v4's is not published and taken to be v5p's.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75 * GIB, 1.2e12, 300e9, 6.25e9, 3, "v4", True,
             (("chip_config_name", "megacore"),)),
        Chip("v5e", 15.75 * GIB, 0.82e12, 200e9, 3.125e9, 2, "v5litepod"),
        Chip("v5p", 95 * GIB, 2.765e12, 600e9, 6.25e9, 3, "v5p", True),
        Chip("v6e", 31.25 * GIB, 1.64e12, 448e9, 12.5e9, 2, "v6e"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """One or more equal slices of a TPU pod.

    Attributes:
        chip: the generation.
        shape: chips along each dimension of a slice.
        slices: how many; they are joined by the data centre's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices together."""
        return math.prod(self.shape) * self.slices

    @property
    def accelerator(self) -> str:
        """What gcloud calls a slice, with the number of them where there are several."""
        count = math.prod(self.shape) * (2 if self.chip.cores_in_name else 1)
        several = f"{self.slices}*" if self.slices > 1 else ""
        return f"{several}{self.chip.gcloud}-{count}"

    def __str__(self) -> str:
        shape = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices}*{shape}" if self.slices > 1 else shape


_SLICES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
              256: (16, 16)}  # fmt: skip


def parse_topology(text: str) -> Topology:
    """Read ``v6e:4x4``, gcloud's ``v6e-16`` or ``v5p-32``, or several slices: ``2*v6e-16``.

    Raises:
        UserError: there is no such TPU or no such slice.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    if found is None:
        raise UserError(
            f"topology {text!r}: expected a generation and the shape of a slice, such as v6e:4x4, "
            "or gcloud's name for it, such as v6e-16; 2*v6e-16 are two slices"
        )
    slices, name, shape, count = found.groups()
    chip = next((c for c in CHIPS.values() if name in (c.name, c.gcloud)), None)
    if chip is None:
        raise UserError(f"topology {text!r}: no TPU is called {name}; known: {', '.join(CHIPS)}")
    if shape is not None:
        sizes = tuple(map(int, shape.split("x")))
        if len(sizes) != chip.dimensions or min(sizes) < 1:
            example = "x".join("4" * chip.dimensions)
            raise UserError(
                f"topology {text!r}: a slice of {chip.name} has {chip.dimensions} dimensions, as "
                f"in {chip.name}:{example}"
            )
    else:
        sizes = _slice_shape(chip, int(count), text)
    if (number := int(slices or 1)) < 1:
        raise UserError(f"topology {text!r}: the number of slices must be at least 1")
    return Topology(chip, sizes, number)


def _slice_shape(chip: Chip, count: int, text: str) -> tuple[int, ...]:
    """The shape gcloud gives to a slice of a name: the most compact one."""
    if chip.dimensions == 2:
        if count not in _SLICES_2D:
            sizes = ", ".join(f"{chip.gcloud}-{n}" for n in _SLICES_2D)
            raise UserError(f"topology {text!r}: there are {sizes}")
        return _SLICES_2D[count]
    chips, odd = divmod(count, 2)
    power = chips.bit_length() - 1
    if odd or chips < 4 or chips != 1 << power:
        raise UserError(
            f"topology {text!r}: {chip.gcloud}-N counts TensorCores, two to a chip: N is 8, 16, "
            f"32, …; for another shape write {chip.name}:4x4x8"
        )
    # doubled from 2x2x1, the last dimension first
    exponents = [1, 1, 0] if power == 2 else [(power + i) // 3 for i in range(3)]
    return tuple(1 << e for e in exponents)
