"""Write a snapshot as a sharded checkpoint: planner and storage for DCP's ``save``."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from rae_xla.checkpoint.compat import StorageInfo
from rae_xla.checkpoint.format import (
    METADATA_FILE,
    THREADS,
    FileFacts,
    Folder,
    error_reason,
    shard_file,
)
from rae_xla.runtime.snapshot import HostTensor, Snapshot


class SaveError(Exception):
    """A checkpoint could not be written; the message has the reason and the failed process."""


def save(
    snapshot: Snapshot,
    folder: Folder,
    *,
    begin: Callable[[], None],
    commit: Callable[[Mapping[str, FileFacts]], None],
    group: Any | None = None,
) -> None:
    """Write this process's shards; all processes of ``group`` call it with the same tensor names.

    Args:
        snapshot: the tensors of this process by ``<part>/<name>``.
        folder: where to write; the same one for all processes.
        begin: called in process 0 before any file is written.
        commit: called in process 0 with all files of all processes, once they are written.
        group: a process group on CPUs (gloo); None for a single process.

    Raises:
        SaveError: in every process, if one of them failed. Nothing was committed then.
    """
    try:
        dcp.save(
            dict(snapshot),
            storage_writer=ShardWriter(folder, begin, commit),
            planner=ShardPlanner(),
            process_group=group,
            no_dist=group is None,
        )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        where = "" if group is None else f"process {rank}: "
        raise SaveError(f"{where}{error_reason(reason)}") from reason


class ShardPlanner(DefaultSavePlanner):
    """Plans the writes of a snapshot's shards and hands the shards to the writer.

    DCP's default planner accepts ``DTensor`` and plain tensors, not the shards of an XLA device
    mesh that were copied to the host.
    """

    state_dict: dict[str, HostTensor]

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plan one write for every shard of this process."""
        self._shards = {
            MetadataIndex(name, torch.Size(shard.offsets)): (tensor, shard.data)
            for name, tensor in self.state_dict.items()
            for shard in tensor.shards
        }
        self.plan = SavePlan([_write_item(i, *shard) for i, shard in self._shards.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Assign a shard that several processes hold to the first of them, and check the plan.

        The check compares volumes. DCP's own compares every pair of shards of a tensor, which
        takes minutes for the shards of hundreds of devices.
        """
        plans, metadata = create_default_global_save_plan(_without_copies(all_plans))
        for name, tensor in self.state_dict.items():
            entry = metadata.state_dict_metadata.get(name)
            chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(tensor.shape):
                raise ValueError(f"the shards of all processes do not cover {name} {tensor.shape}")
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the shard to write."""
        return self._shards[index][1]


def _write_item(index: MetadataIndex, tensor: HostTensor, data: Tensor) -> WriteItem:
    assert index.offset is not None
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=index.offset, sizes=data.shape),
            properties=TensorProperties(dtype=data.dtype),
            size=torch.Size(tensor.shape),
        ),
    )


def _without_copies(plans: list[SavePlan]) -> list[SavePlan]:
    """Keep each shard in the plan of the first process that holds it."""
    assigned: set[MetadataIndex] = set()
    kept = []
    for plan in plans:
        items = [item for item in plan.items if item.index not in assigned]
        assigned.update(item.index for item in items)
        kept.append(replace(plan, items=items))
    return kept


@dataclass(frozen=True)
class _ShardLocation:
    """The range of a file that a shard was written to, and the facts of that file."""

    range: StorageInfo
    file: FileFacts


class ShardWriter(StorageWriter):
    """Writes the shards of each part to a file with a SHA-256; see ``format`` for why not DCP's."""

    def __init__(
        self,
        folder: Folder,
        begin: Callable[[], None],
        commit: Callable[[Mapping[str, FileFacts]], None],
    ) -> None:
        self._folder, self._begin, self._commit = folder, begin, commit
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a writer is used for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Prepare the folder in process 0; no process writes before DCP has sent out the plans."""
        self._rank = kwargs.get("rank") or 0
        if is_coordinator:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans unchanged."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this process, ``THREADS`` at a time."""
        parts: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            parts.setdefault(item.index.fqn.partition("/")[0], []).append(item)
        with ThreadPoolExecutor(THREADS, "checkpoint-file") as pool:
            written = pool.map(lambda part: self._write_part(part, parts[part], planner), parts)
            results = [result for file in written for result in file]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_part(
        self, part: str, items: Sequence[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        name = shard_file(part, self._rank)
        digest, size, lengths = hashlib.sha256(), 0, []
        with self._folder.create(name) as file:
            for item in items:
                buffer = io.BytesIO()
                shard = cast("Tensor", planner.resolve_data(item))
                if shard.untyped_storage().nbytes() > shard.nbytes:
                    shard = shard.clone()  # torch.save writes the whole storage behind a view
                torch.save(shard, buffer)
                content = buffer.getvalue()  # getbuffer() in a traceback crashes Python 3.12.1
                digest.update(content)
                file.write(content)
                lengths.append(len(content))
                size += len(content)
        facts = FileFacts(size, digest.hexdigest())
        results, start = [], 0
        for item, length in zip(items, lengths, strict=True):
            location = _ShardLocation(StorageInfo(name, start, length), facts)
            results.append(WriteResult(item.index, length, location))
            start += length
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table of all shards and commit; DCP calls this in process 0."""
        written = [result for process in results for result in process]
        metadata.storage_data = {r.index: r.storage_data.range for r in written}
        content = pickle.dumps(metadata)
        with self._folder.create(METADATA_FILE) as file:
            file.write(content)
        files = {r.storage_data.range.relative_path: r.storage_data.file for r in written}
        files[METADATA_FILE] = FileFacts(len(content), hashlib.sha256(content).hexdigest())
        self._commit(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Reject identifiers: a writer is constructed for its folder."""
        return False
