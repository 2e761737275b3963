"""The slices and hosts of a TPU pod: how they are found, and meshes that do not fit them.

Several slices are connected by libtpu's Megascale, which reads ``MEGASCALE_COORDINATOR_ADDRESS``,
``MEGASCALE_NUM_SLICES`` and ``MEGASCALE_SLICE_ID``. Cloud TPU writes them to the ``tpu-env`` entry
of the metadata of every host; GKE sets environment variables. jax reads both, in this order
(``jax._src.clusters.cloud_tpu_cluster``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from rae_xla.errors import UserError
from rae_xla.runtime.mesh import MeshShape

COORDINATOR, NUM_SLICES, SLICE_ID = (
    f"MEGASCALE_{name}" for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")
)

Metadata = Callable[[], Mapping[str, object]]
"""Returns the ``tpu-env`` entry of the metadata of this host."""


class Megascale:
    """The Megascale variables of this host.

    Args:
        metadata: read if the environment does not have a variable.
        environment: the environment variables.
    """

    def __init__(self, metadata: Metadata, environment: Mapping[str, str] = os.environ) -> None:
        self._metadata, self._environment = metadata, environment

    def _read(self, name: str) -> str | None:
        value = self._environment.get(name)
        if value is None:
            value = self._metadata().get(name)  # type: ignore[assignment]
        return None if value is None else str(value)

    @property
    def coordinator(self) -> str | None:
        """Address, without a port, of the host of process 0; None in a single slice."""
        address = self._read(COORDINATOR)
        return address.split(":")[0] if address else None

    @property
    def slice_id(self) -> int:
        """Number of this slice, from 0."""
        return self._number(SLICE_ID) or 0

    @property
    def num_slices(self) -> int | None:
        """Number of slices that are to join; None if there is no such variable."""
        return self._number(NUM_SLICES)

    def _number(self, name: str) -> int | None:
        value = self._read(name)
        if not value:
            return None
        if not value.isdigit():
            raise UserError(f"{name} is {value!r}: it must be a number; set by Cloud TPU or GKE")
        return int(value)


def check_slices(mesh: MeshShape, found: int, expected: int | None) -> None:
    """Check that all slices have joined, and that the mesh describes them.

    Args:
        mesh: of the run.
        found: number of slices that the devices of the run belong to.
        expected: number of slices that the environment names, if it does.

    Raises:
        UserError: slices are missing, which would train on their own and overwrite each other's
            checkpoints; or the mesh has another number of slices than the devices.
    """
    if expected is not None and expected != found:
        raise UserError(
            f"{NUM_SLICES} is {expected}, but the devices of this run belong to {found} "
            f"slice{'s' * (found > 1)}: the slices did not join, and each of them would train on "
            "its own and write the same checkpoints. Start the run on every host of all slices at "
            f"the same time, and check that the hosts reach {COORDINATOR}. (To train on a single "
            f"slice, unset {NUM_SLICES} and {COORDINATOR})"
        )
    replicas_only = mesh.slices == 1 and mesh.fsdp * mesh.tensor == 1  # as when sampling
    if mesh.slices != found and not replicas_only:
        raise UserError(
            f"mesh.dcn describes {mesh.slices} slice{'s' * (mesh.slices > 1)}, but the devices of "
            f"this run belong to {found}: set mesh.dcn.data={found}, a replica of the state for "
            "each slice. (mesh.dcn.fsdp shards a replica over slices, and sends its weights over "
            "the network between them)"
        )


def check_tensor_groups(groups: Sequence[Sequence[int]], processes: int) -> None:
    """Check that every process has complete rows of the batch.

    Args:
        groups: for each shard of the batch, the processes that own its devices.
        processes: number of processes.

    Raises:
        UserError: the devices of a shard belong to several processes, each of which loads other
            rows; or the shards are not evenly distributed.
    """
    owners = [set(group) for group in groups]
    if any(len(of_group) > 1 for of_group in owners):
        raise UserError(
            f"mesh.ici.tensor={len(groups[0])} puts the devices of a tensor group on several "
            "hosts, which load different images: choose a number that divides the devices of a host"
        )
    counts = [sum(of_group == {process} for of_group in owners) for process in range(processes)]
    if len(set(counts)) > 1:
        raise UserError(f"the hosts have different numbers of shards of the batch: {counts}")
