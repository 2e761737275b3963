"""Division of the global batch into micro-batches and over devices."""

from __future__ import annotations

from dataclasses import dataclass

from rae_xla.config.run import RunConfig
from rae_xla.errors import UserError


@dataclass(frozen=True)
class BatchSplit:
    """Batch sizes of one optimizer step, in images.

    Attributes:
        global_batch_size: per optimizer step, over all devices.
        micro_batch_size: per forward pass, over all devices.
        per_device: per forward pass on each device.
    """

    global_batch_size: int
    micro_batch_size: int
    per_device: int


def split_batch(config: RunConfig, batch_shards: int) -> BatchSplit:
    """Divide the batch of a run over its devices.

    Args:
        config: of the run.
        batch_shards: number of devices that the batch is split over. Devices along the mesh's
            ``tensor`` axis share one shard.

    Raises:
        UserError: if no batch size is given, if two contradictory ones are given, or if a
            micro-batch cannot be split evenly over the devices.
    """
    training = config.training
    parts = batch_shards * training.grad_accum_steps
    factors = f"{batch_shards} devices x grad_accum_steps {training.grad_accum_steps}"
    implied = training.batch_size and training.batch_size * parts
    batch = training.global_batch_size or implied
    if batch is None:
        raise UserError(
            "training.global_batch_size is missing: images per optimizer step, over all devices"
        )
    if implied is not None and batch != implied:
        raise UserError(
            f"training.global_batch_size {batch} is not training.batch_size {training.batch_size}"
            f" x {factors} = {implied}: give only one of the two"
        )
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        raise UserError(
            f"training.global_batch_size {batch} cannot be split evenly over {factors}: write a"
            f" multiple of {parts}, such as {nearest}"
        )
    return BatchSplit(batch, batch // training.grad_accum_steps, batch // parts)
