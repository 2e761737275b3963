"""TPU generations with their specifications, and the topologies of TPU slices.

Sources: bandwidths from cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (system architecture); the
memory that the compiler may use was measured with libtpu 0.0.21 (v5p: nominal size, not measured);
peak FLOP/s are those of ``runtime.accelerators``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rae_xla.errors import UserError
from rae_xla.runtime.accelerators import known_accelerator

GIB = 2**30


@dataclass(frozen=True)
class TPUGeneration:
    """Specifications of a TPU generation, per chip.

    Attributes:
        name: as in the name of a topology (``v6e:4x4``).
        hbm_bytes: memory that the compiler lets a program use.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that a chip can send over all its links, one way.
        dcn_bandwidth: bytes/s of the network between slices, per chip.
        dimensions: of the torus.
        gcloud: prefix of gcloud's accelerator types.
        cores_in_name: whether accelerator types count TensorCores, two per chip, instead of chips.
        options: options that libtpu needs to describe a topology without a TPU.
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
        accelerator = known_accelerator(self.name)
        assert accelerator is not None, self.name
        return accelerator.peak_flops


# Network between slices: 25.6 Tbit/s for the 256 chips of a v6e pod, 6.4 Tbit/s for v5e, 50 Gbit/s
# per chip for v5p; v4 is not published and assumed to equal v5p.
TPU_GENERATIONS = {
    generation.name: generation
    for generation in (
        TPUGeneration("v4", 30.75 * GIB, 1.2e12, 300e9, 6.25e9, 3, "v4", True,
             (("chip_config_name", "megacore"),)),
        TPUGeneration("v5e", 15.75 * GIB, 0.82e12, 200e9, 3.125e9, 2, "v5litepod"),
        TPUGeneration("v5p", 95 * GIB, 2.765e12, 600e9, 6.25e9, 3, "v5p", True),
        TPUGeneration("v6e", 31.25 * GIB, 1.64e12, 448e9, 12.5e9, 2, "v6e"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """One or more equal slices of a TPU pod.

    Attributes:
        generation: of the chips.
        shape: chips along each dimension of a slice.
        slices: number of slices, connected by the data-centre network.
    """

    generation: TPUGeneration
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def chips_per_host(self) -> int:
        """Number of chips of a host: 4, or all of a v5e or v6e slice of up to 8 chips."""
        chips = math.prod(self.shape)
        return min(chips, 8 if self.generation.dimensions == 2 and chips <= 8 else 4)

    @property
    def accelerator(self) -> str:
        """gcloud's accelerator type, preceded by the number of slices if there are several."""
        count = math.prod(self.shape) * (2 if self.generation.cores_in_name else 1)
        prefix = f"{self.slices}*" if self.slices > 1 else ""
        return f"{prefix}{self.generation.gcloud}-{count}"

    def __str__(self) -> str:
        shape = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices}*{shape}" if self.slices > 1 else shape


_SLICES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
              256: (16, 16)}  # fmt: skip


def parse_topology(text: str) -> Topology:
    """Parse ``v6e:4x4``, gcloud's ``v6e-16`` or ``v5p-32``, or several slices: ``2*v6e-16``.

    Raises:
        UserError: if the TPU or the slice does not exist.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    if found is None:
        raise UserError(
            f"topology {text!r}: expected a generation and the shape of a slice, such as v6e:4x4, "
            "or gcloud's accelerator type, such as v6e-16; 2*v6e-16 are two slices"
        )
    slices, name, shape, count = found.groups()
    generation = next((g for g in TPU_GENERATIONS.values() if name in (g.name, g.gcloud)), None)
    if generation is None:
        known = ", ".join(TPU_GENERATIONS)
        raise UserError(f"topology {text!r}: unknown TPU {name}; known: {known}")
    if shape is not None:
        sizes = tuple(map(int, shape.split("x")))
        if len(sizes) != generation.dimensions or min(sizes) < 1:
            example = "x".join("4" * generation.dimensions)
            raise UserError(
                f"topology {text!r}: a slice of {generation.name} has {generation.dimensions} "
                f"dimensions, as in {generation.name}:{example}"
            )
    else:
        sizes = _slice_shape(generation, int(count), text)
    if (number := int(slices or 1)) < 1:
        raise UserError(f"topology {text!r}: the number of slices must be at least 1")
    return Topology(generation, sizes, number)


def _slice_shape(generation: TPUGeneration, count: int, text: str) -> tuple[int, ...]:
    """Return the default shape of a gcloud accelerator type: the most compact one."""
    if generation.dimensions == 2:
        if count not in _SLICES_2D:
            sizes = ", ".join(f"{generation.gcloud}-{n}" for n in _SLICES_2D)
            raise UserError(f"topology {text!r}: no such slice; available: {sizes}")
        return _SLICES_2D[count]
    chips, odd = divmod(count, 2)
    power = chips.bit_length() - 1
    if odd or chips < 4 or chips != 1 << power:
        raise UserError(
            f"topology {text!r}: {generation.gcloud}-N counts TensorCores, two per chip: N is 8, "
            f"16, 32, …; for another shape write {generation.name}:4x4x8"
        )
    # gcloud doubles 2x2x1, the last dimension first.
    exponents = [1, 1, 0] if power == 2 else [(power + i) // 3 for i in range(3)]
    return tuple(1 << e for e in exponents)
