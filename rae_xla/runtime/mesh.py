"""The device mesh: how the batch and the state are split over the devices of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig

AXES = ("data", "fsdp", "tensor")
"""The axes of a mesh, the slowest first: neighbours on the last one are nearest to each other."""

BATCH = ("data", "fsdp")
"""The axes that the batch is split over."""


@dataclass(frozen=True)
class MeshShape:
    """A mesh of ``slices * data * fsdp * tensor`` devices.

    Attributes:
        data: replicas of the state within a slice.
        fsdp: devices that share one copy of the state and split the batch.
        tensor: devices that share one copy of the state and of the batch, and split the layers.
        slices: replicas of all that, joined by the data centre's network.
    """

    data: int
    fsdp: int
    tensor: int = 1
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.batch_parts * self.tensor

    @property
    def batch_parts(self) -> int:
        """Equal parts that the batch is cut into."""
        return self.slices * self.data * self.fsdp

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Devices along each axis of the whole mesh; slices are on the data axis."""
        return {"data": self.slices * self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    def __str__(self) -> str:
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        tensor = f" x tensor={self.tensor}" if self.tensor > 1 else ""
        return f"{slices}data={self.data} x fsdp={self.fsdp}{tensor}"


def resolve_mesh(settings: MeshConfig, devices: int) -> MeshShape:
    """Fill in an axis given as -1 and check that the mesh covers every device.

    Args:
        settings: sizes of the axes; -1 is all devices that remain.
        devices: of the run, over all hosts.

    Raises:
        UserError: when the axes do not multiply to the number of devices.
    """
    slices = settings.dcn.data
    sizes = {axis: getattr(settings.ici, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"mesh.ici.{open_axes[0]} and mesh.ici.{open_axes[1]} are both -1: only one axis can "
            "take the devices that remain; give the others a size"
        )
    given = slices
    for size in sizes.values():
        given *= 1 if size == -1 else size
    if open_axes and given > 0 and devices % given == 0:
        sizes[open_axes[0]] = devices // given
        given = devices
    if min(*sizes.values(), slices) < 1 or given != devices:
        said = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh: dcn.data={slices} x ici ({said}) does not make the {devices} devices of this "
            "run; change a size in mesh.ici (-1 means: all that remain) or mesh.dcn.data"
        )
    return MeshShape(**sizes, slices=slices)
