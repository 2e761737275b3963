"""A configuration against the devices it is to run on, once their number is known."""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.config.run import RunConfig
from rae_xla.errors import UserError


@dataclass(frozen=True)
class MeshShape:
    """The mesh and the batch on a given number of devices."""

    data: int
    fsdp: int
    global_batch_size: int
    """Images per optimizer step."""
    micro_batch_size: int
    """Images per forward pass, over all devices."""


def check_mesh(config: RunConfig, device_count: int) -> MeshShape:
    """Lay the mesh and the batch out over ``device_count`` devices.

    Raises:
        UserError: the mesh axes do not multiply to the devices, no batch size is given, or a
            micro-batch cannot be split over the devices.
    """
    data, fsdp = _axes(config.mesh.data, config.mesh.fsdp, device_count)
    training = config.training
    per_device, batch = training.batch_size, training.global_batch_size
    parts = training.grad_accum_steps
    if batch is None and per_device is None:
        raise UserError(
            "training.global_batch_size is missing: images per optimizer step, over all devices"
        )
    implied = None if per_device is None else per_device * device_count * parts
    if batch is None:
        batch = implied
    elif implied is not None and batch != implied:
        raise UserError(
            f"training.global_batch_size {batch} is not training.batch_size {per_device} x"
            f" {device_count} devices x grad_accum_steps {parts} = {implied}: leave batch_size out"
        )
    assert batch is not None
    if batch % (device_count * parts):
        step = device_count * parts
        near = max(step, round(batch / step) * step)
        raise UserError(
            f"training.global_batch_size {batch} cannot be split over {device_count} devices x"
            f" grad_accum_steps {parts}: write a multiple of {step}, such as {near}"
        )
    return MeshShape(data, fsdp, batch, batch // parts)


def _axes(data: int, fsdp: int, device_count: int) -> tuple[int, int]:
    fixed = (1 if data == -1 else data) * (1 if fsdp == -1 else fsdp)
    rest, over = divmod(device_count, fixed)
    if over or (rest != 1 and -1 not in (data, fsdp)):
        raise UserError(
            f"mesh.data {data} x mesh.fsdp {fsdp} does not fit {device_count} device"
            f"{'s' * (device_count != 1)}: their product must be {device_count} (-1: the others)"
        )
    return (rest if data == -1 else data), (rest if fsdp == -1 else fsdp)
