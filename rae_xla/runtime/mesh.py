"""The device mesh: how many devices share the batch and the state, and along which axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
"""Axes of the mesh, the slowest first: devices adjacent on the last axis have the fastest links."""

BATCH = ("data", "fsdp")
"""Axes that the batch is split over."""


@dataclass(frozen=True)
class MeshShape:
    """A mesh of ``slices * data * fsdp * tensor`` devices.

    Attributes:
        data: number of copies of the state within a slice.
        fsdp: number of devices that share one copy of the state and split the batch.
        tensor: number of devices that share one copy of the state and the same rows, and split the
            layers.
        slices: number of slices, each with the devices above; a data-centre network connects them.
        fsdp_slices: number of slices that share one copy of the state.
    """

    data: int
    fsdp: int
    tensor: int = 1
    slices: int = 1
    fsdp_slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.batch_shards * self.tensor

    @property
    def batch_shards(self) -> int:
        """Number of equal shards of the batch."""
        return self.slices * self.data * self.fsdp

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Number of devices along each axis; slices are part of the axes data and fsdp."""
        return {
            "data": self.slices // self.fsdp_slices * self.data,
            "fsdp": self.fsdp_slices * self.fsdp,
            "tensor": self.tensor,
        }

    def __str__(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        tensor = f" x tensor={self.tensor}" if self.tensor > 1 else ""
        across = f" (fsdp over {self.fsdp_slices} slices)" if self.fsdp_slices > 1 else ""
        return f"{slices}data={self.data} x fsdp={self.fsdp}{tensor}{across}"


def resolve_mesh(settings: MeshConfig, devices: int) -> MeshShape:
    """Return the mesh of a run, with an axis of -1 filled in.

    Args:
        settings: the ``mesh`` section of the configuration.
        devices: number of devices of the run, over all hosts.

    Raises:
        UserError: the product of the axes is not the number of devices.
    """
    slices = settings.dcn.data * settings.dcn.fsdp
    sizes = {axis: getattr(settings.ici, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"mesh.ici.{open_axes[0]} and mesh.ici.{open_axes[1]} are both -1: only one axis can "
            "take the remaining devices; give the other a size"
        )
    given = slices
    for size in sizes.values():
        given *= 1 if size == -1 else size
    if open_axes and given > 0 and devices % given == 0:
        sizes[open_axes[0]] = devices // given
        given = devices
    if min(*sizes.values(), slices) < 1 or given != devices:
        ici = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh: {slices} slice{'s' * (slices > 1)} (mesh.dcn) x ici ({ici}) does not match the "
            f"{devices} devices of this run; change a size in mesh.ici (-1: all remaining devices) "
            "or mesh.dcn"
        )
    return MeshShape(**sizes, slices=slices, fsdp_slices=settings.dcn.fsdp)


def check_tensor_axis(mesh: MeshShape, devices_per_host: int) -> None:
    """Check that the devices of a tensor group can be on one host.

    They work on the same images, and every host loads its own.

    Raises:
        UserError: they cannot.
    """
    if mesh.size > devices_per_host and devices_per_host % mesh.tensor:
        raise UserError(
            f"mesh.ici.tensor={mesh.tensor} does not divide the {devices_per_host} devices of a "
            "host: the devices of a tensor group would be on several hosts, which load different "
            "images. Choose a divisor"
        )
