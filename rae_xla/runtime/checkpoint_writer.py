"""Host shards into files: a planner and a storage for ``torch.distributed.checkpoint.save``."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
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

from rae_xla.runtime.checkpoint_files import METADATA, THREADS, FileFacts, Files
from rae_xla.runtime.snapshot import HostTensor


class ShardPlanner(DefaultSavePlanner):
    """Plans and hands over the shards of ``HostTensor``s."""

    state_dict: dict[str, HostTensor]

    def __init__(self) -> None:
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
        )

    def create_local_plan(self) -> SavePlan:
        """A write for every shard this process holds."""
        self._shards = {
            MetadataIndex(name, torch.Size(shard.offsets)): (tensor, shard.data)
            for name, tensor in self.state_dict.items()
            for shard in tensor.shards
        }
        self.plan = SavePlan([_write_item(i, *shard) for i, shard in self._shards.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Of several processes with the same shard the first writes it.

        The plan is checked by volume: torch compares every two shards of a tensor, which for those
        of hundreds of devices takes minutes.
        """
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        for name, tensor in self.state_dict.items():
            found = metadata.state_dict_metadata.get(name)
            chunks = found.chunks if isinstance(found, TensorStorageMetadata) else []
            if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(tensor.shape):
                raise ValueError(f"the processes' shards do not make up {name} {tensor.shape}")
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The shard that is to be written."""
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


@dataclass(frozen=True)
class _Written:
    """Where a shard lies, and what its file has become."""

    place: _StorageInfo
    file: FileFacts


class ShardWriter(StorageWriter):
    """Writes a file for each part, ``<part>-<process>.distcp``."""

    def __init__(
        self,
        files: Files,
        begin: Callable[[], None],
        commit: Callable[[Mapping[str, FileFacts]], None],
    ) -> None:
        self._files, self._begin, self._commit = files, begin, commit
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Process 0 makes room, before the plans go out and so before anybody writes."""
        self._rank = kwargs.get("rank") or 0
        if is_coordinator:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's files, several at a time."""
        parts: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            parts.setdefault(item.index.fqn.partition("/")[0], []).append(item)
        with ThreadPoolExecutor(THREADS, "checkpoint-file") as pool:
            written = pool.map(lambda part: self._write(part, parts[part], planner), parts)
            results = [result for file in written for result in file]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(
        self, part: str, items: Sequence[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        name = f"{part}-{self._rank}.distcp"
        digest, size, lengths = hashlib.sha256(), 0, []
        with self._files.create(name) as file:
            for item in items:
                buffer = io.BytesIO()
                shard = cast("Tensor", planner.resolve_data(item))
                if shard.untyped_storage().nbytes() > shard.nbytes:
                    shard = shard.clone()  # of a view torch would save all that it is a view of
                torch.save(shard, buffer)
                content = buffer.getvalue()  # a view in a traceback would crash Python 3.12.1
                digest.update(content)
                file.write(content)
                lengths.append(len(content))
                size += len(content)
        facts = FileFacts(size, digest.hexdigest())
        results, start = [], 0
        for item, length in zip(items, lengths, strict=True):
            place = _StorageInfo(name, start, length)
            results.append(WriteResult(item.index, length, _Written(place, facts)))
            start += length
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Process 0 writes the table of all shards and commits."""
        written = [result for process in results for result in process]
        metadata.storage_data = {r.index: r.storage_data.place for r in written}
        content = pickle.dumps(metadata)
        with self._files.create(METADATA) as file:
            file.write(content)
        files = {r.storage_data.place.relative_path: r.storage_data.file for r in written}
        files[METADATA] = FileFacts(len(content), hashlib.sha256(content).hexdigest())
        self._commit(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are no identifiers: a writer is made for one folder."""
        return False
