"""The batch against the devices a run is to use, once their number is known."""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.config.run import RunConfig
from rae_xla.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """How the images of one optimizer step are cut."""

    global_batch_size: int
    """Images per optimizer step."""
    micro_batch_size: int
    """Images per forward pass, over all devices."""
    per_device: int
    """Images per forward pass on each device."""


def check_mesh(config: RunConfig, device_count: int) -> BatchSplit:
    """Cut the batch for the ``device_count`` devices it is split over: all of them but those that
    the ``tensor`` axis of the mesh puts side by side.

    Raises:
        UserError: no batch size is given, two are that differ, or a micro-batch cannot be split
            evenly over the devices.
    """
    training = config.training
    parts = device_count * training.grad_accum_steps
    places = f"{device_count} devices x grad_accum_steps {training.grad_accum_steps}"
    implied = training.batch_size and training.batch_size * parts
    batch = training.global_batch_size or implied
    if batch is None:
        raise UserError(
            "training.global_batch_size is missing: images per optimizer step, over all devices"
        )
    if implied is not None and batch != implied:
        raise UserError(
            f"training.global_batch_size {batch} is not training.batch_size {training.batch_size}"
            f" x {places} = {implied}: give only one of the two"
        )
    if batch % parts:
        near = max(1, round(batch / parts)) * parts
        raise UserError(
            f"training.global_batch_size {batch} cannot be split evenly over {places}: write a"
            f" multiple of {parts}, such as {near}"
        )
    return BatchSplit(batch, batch // training.grad_accum_steps, batch // parts)
