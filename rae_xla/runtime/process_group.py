"""Processes that torchrun has started, one for each device, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.runtime.launch import Launch

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the slowest: another may be downloading weights, or compiling."""


def choose_device(launch: Launch) -> torch.device:
    """The GPU of this process, where there are any; else the CPU.

    Raises:
        UserError: there are more processes on this host than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_index >= torch.cuda.device_count():
        raise UserError(
            f"this is process {launch.local_index + 1} on this machine, which has "
            f"{torch.cuda.device_count()} GPUs: give torchrun --nproc-per-node "
            f"{torch.cuda.device_count()}"
        )
    device = torch.device("cuda", launch.local_index)
    torch.cuda.set_device(device)
    return device


def join(device: torch.device) -> None:
    """Find the other processes: NCCL carries what is on GPUs, gloo what is on CPUs.

    Raises:
        UserError: they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except dist.DistError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            "the processes of this run do not find each other at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({reason}): see that "
            "torchrun was started on every host with the same --rdzv-endpoint and --nnodes"
        ) from error


def new_group() -> dist.ProcessGroup:
    """A group of all processes that talks about what is on CPUs; each must ask for it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def exchange(text: str) -> list[str]:
    """Every process's ``text``, by process."""
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def mean(values: Sequence[Tensor]) -> list[Tensor]:
    """Means over the processes, float32, with one message for all values."""
    if not values:
        return []
    flat = torch.cat([value.detach().float().reshape(-1) for value in values])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (count * B, ...), in their order, of (B, ...) in each."""
    rows = rows.contiguous()
    whole = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(whole, rows)
    return whole
