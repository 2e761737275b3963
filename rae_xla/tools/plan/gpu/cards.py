"""GPUs with their specifications, and clusters of them.

Sources: NVIDIA's data sheets of each card (bandwidths; float32 without tensor cores); the memory is
what ``torch.cuda.get_device_properties`` reports, rounded down. Peak FLOP/s in bf16 are those of
``runtime.accelerators``. NVLink and PCIe are bytes/s one way. The network between hosts is that of
the usual servers: 400 Gbit/s for each H100, H200 and B200 (DGX), 200 Gbit/s for each A100, and 100
Gbit/s for a server of eight other cards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rae_xla.errors import UserError
from rae_xla.runtime.accelerators import known_accelerator

GIB = 2**30

RESERVED = 1.0 * GIB
"""Memory of the CUDA context (about 0.5 GiB), and of the workspaces of cuBLAS, cuDNN and NCCL."""

FRAGMENTATION = 0.05
"""Share of the memory that the caching allocator holds but cannot use."""

GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Card:
    """Specifications of one kind of GPU.

    Attributes:
        name: as in ``8xh100``.
        driver_name: of the driver, which ``known_accelerator`` knows.
        memory_bytes: size of its memory.
        bandwidth: of its memory, bytes/s.
        fp32_flops: FLOP/s in float32 without tensor cores.
        link_bandwidth: bytes/s to the other GPUs of its host, one way.
        network_bandwidth: bytes/s to other hosts.
    """

    name: str
    driver_name: str
    memory_bytes: float
    bandwidth: float
    fp32_flops: float
    link_bandwidth: float
    network_bandwidth: float

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s, accumulated in float32."""
        accelerator = known_accelerator(self.driver_name)
        assert accelerator is not None, self.driver_name
        return accelerator.peak_flops

    @property
    def usable_bytes(self) -> float:
        """Memory that the tensors of a run can fill."""
        return self.memory_bytes * (1 - FRAGMENTATION) - RESERVED


_PCIE4, _PCIE5 = 25e9, 50e9  # of x16, as NCCL reaches it
_SHARED = 100e9 / 8 / GPUS_PER_HOST

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("b200", "NVIDIA B200", 178 * GIB, 8.0e12, 75e12, 900e9, 50e9),
        Card("h200", "NVIDIA H200", 139.8 * GIB, 4.8e12, 67e12, 450e9, 50e9),
        Card("h100", "NVIDIA H100 80GB HBM3", 79.1 * GIB, 3.35e12, 67e12, 450e9, 50e9),
        Card("h100-pcie", "NVIDIA H100 PCIe", 79.1 * GIB, 2.0e12, 51e12, _PCIE5, _SHARED),
        Card("a100", "NVIDIA A100-SXM4-80GB", 79.1 * GIB, 2.04e12, 19.5e12, 300e9, 25e9),
        Card("a100-40", "NVIDIA A100-SXM4-40GB", 39.4 * GIB, 1.55e12, 19.5e12, 300e9, 25e9),
        Card("l40s", "NVIDIA L40S", 44.4 * GIB, 864e9, 91.6e12, _PCIE4, _SHARED),
        Card("a6000", "NVIDIA RTX A6000", 47.4 * GIB, 768e9, 38.7e12, _PCIE4, _SHARED),
        Card("5090", "NVIDIA GeForce RTX 5090", 31.3 * GIB, 1.79e12, 104.8e12, _PCIE5, _SHARED),
        Card("4090", "NVIDIA GeForce RTX 4090", 23.5 * GIB, 1.01e12, 82.6e12, _PCIE4, _SHARED),
        Card("3090", "NVIDIA GeForce RTX 3090", 23.6 * GIB, 936e9, 35.6e12, _PCIE4, _SHARED),
        Card("a10g", "NVIDIA A10G", 22.0 * GIB, 600e9, 31.2e12, _PCIE4, _SHARED),
        Card("l4", "NVIDIA L4", 22.0 * GIB, 300e9, 30.3e12, _PCIE4, _SHARED),
    )
}
"""Known GPUs by name."""


@dataclass(frozen=True)
class Cluster:
    """A number of equal GPUs, in hosts of ``GPUS_PER_HOST``.

    Attributes:
        card: kind of the GPUs.
        gpus: number of GPUs over all hosts.
    """

    card: Card
    gpus: int

    def bandwidth(self, ranks: Sequence[int]) -> float:
        """Return the bytes/s that each of these processes can send to another of them."""
        hosts = {rank // GPUS_PER_HOST for rank in ranks}
        return self.card.network_bandwidth if len(hosts) > 1 else self.card.link_bandwidth

    def __str__(self) -> str:
        return f"{self.gpus}x{self.card.name}"


def parse_gpus(text: str) -> Cluster:
    """Parse the number and the kind of GPUs, such as ``8xh100`` or ``1x4090``.

    Raises:
        UserError: if the text has another form, or the GPU is unknown.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", text.strip().lower())
    known = ", ".join(CARDS)
    if found is None or int(found[1] or 1) < 1:
        raise UserError(
            f"--gpus {text!r}: expected a number and a kind of GPU, such as 8xh100 or 1x4090; "
            f"known: {known}"
        )
    if found[2] not in CARDS:
        raise UserError(f"--gpus {text!r}: unknown GPU {found[2]}; known: {known}")
    return Cluster(CARDS[found[2]], int(found[1] or 1))
