"""The device mesh: how many devices hold copies of the state, how many share one copy."""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.errors import UserError


@dataclass(frozen=True)
class MeshShape:
    """A mesh of ``data * fsdp`` devices.

    The batch is split over both axes; parameters, optimizer state and EMA over ``fsdp`` alone, so
    ``data`` counts replicas of the state.
    """

    data: int
    fsdp: int

    @property
    def size(self) -> int:
        """Number of devices, and of equal parts of the batch."""
        return self.data * self.fsdp


AXES = ("data", "fsdp")


def resolve_mesh(data: int, fsdp: int, devices: int) -> MeshShape:
    """Fill in an axis given as -1 and check that the mesh covers every device.

    Raises:
        UserError: when the axes do not multiply to the number of devices.
    """
    if data == -1 and fsdp == -1:
        raise UserError("mesh.data and mesh.fsdp are both -1: give at least one of them a size")
    if data == -1 and devices % fsdp == 0:
        data = devices // fsdp
    if fsdp == -1 and devices % data == 0:
        fsdp = devices // data
    if min(data, fsdp) < 1 or data * fsdp != devices:
        raise UserError(
            f"mesh: data={data} x fsdp={fsdp} does not make the {devices} devices of this run; "
            "change mesh.data or mesh.fsdp (-1 means: all that remain)"
        )
    return MeshShape(data, fsdp)
