"""Sharded checkpoints in the layout of torch.distributed.checkpoint (DCP), to and from any storage.

Every process writes the shards it holds; process 0 writes ``.metadata``, which says where in which
file each shard of each tensor lies. ``torch.distributed.checkpoint`` itself reads the result.

Tensors are named ``<part>/<name>`` (``ema/blocks.0.attn.qkv.weight``), and a part has files of its
own, so that who wants the averaged weights alone reads nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rae_xla.runtime.checkpoint_files import FileFacts, Files
from rae_xla.runtime.checkpoint_reader import ShardReader, read_table
from rae_xla.runtime.checkpoint_writer import ShardPlanner, ShardWriter
from rae_xla.runtime.snapshot import Snapshot

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it is meant so


class SaveError(Exception):
    """A checkpoint could not be written; the text has the reason, and where it arose."""


def save(
    snapshot: Snapshot,
    files: Files,
    *,
    begin: Callable[[], None],
    commit: Callable[[Mapping[str, FileFacts]], None],
    group: Any | None = None,
) -> None:
    """Write this process's shards; every process of ``group`` must call it, with the same names.

    Args:
        snapshot: what this process holds, by ``<part>/<name>``.
        files: the folder; all processes must reach the same one.
        begin: called in process 0 before any file is written.
        commit: called in process 0 when all files of all processes are there, with all of them.
        group: a process group on CPUs (gloo); None for a process that is alone.

    Raises:
        SaveError: in every process, if one of them failed; nothing was committed.
    """
    try:
        dcp.save(
            dict(snapshot),
            storage_writer=ShardWriter(files, begin, commit),
            planner=ShardPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        where = "" if group is None else f"process {rank}: "
        raise SaveError(f"{where}{_said(reason)}") from error


def _said(error: BaseException) -> str:
    """The reason an error gives. torch reports a full disk as a RuntimeError of its zip writer."""
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
        return "no space left, or a limit on file sizes"
    return str(error) or type(error).__name__


def stored_tensors(files: Files) -> dict[str, Tensor]:
    """What a checkpoint holds, as tensors on the meta device: shapes and types without values.

    Raises:
        OSError: there is none, or it cannot be reached.
        ValueError: its ``.metadata`` cannot be understood.
    """
    stored = read_table(files).state_dict_metadata
    return {
        name: torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        for name, found in stored.items()
        if isinstance(found, TensorStorageMetadata)
    }


def load(tensors: Mapping[str, Tensor], files: Files) -> None:
    """Fill whole tensors on the host, whatever processes and devices the checkpoint is from.

    Args:
        tensors: by ``<part>/<name>``, each of the stored shape; what is not named is not read.
        files: the checkpoint's folder.

    Raises:
        OSError: it cannot be reached.
        ValueError: a file does not hold what ``.metadata`` says.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(tensors), storage_reader=ShardReader(files), planner=planner, no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        if isinstance(reason, OSError):
            raise reason from error
        raise ValueError(_said(reason)) from error
