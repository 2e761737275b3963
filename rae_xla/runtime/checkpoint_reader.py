"""Files into whole tensors: a storage for ``torch.distributed.checkpoint.load``."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from rae_xla.runtime.checkpoint_files import METADATA, THREADS, Files


class ShardReader(StorageReader):
    """Reads shards by ranges of their files."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of all shards."""
        return read_table(self._files)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Remember where the shards are."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for, several ranges at a time."""

        def read(item: ReadItem) -> None:
            place = self._places[item.storage_index]
            content = self._files.read_range(place.relative_path, place.offset, place.length)
            shard = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            for dim, (start, size) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                shard = shard.narrow(dim, start, size)
            with torch.no_grad():
                planner.resolve_tensor(item).copy_(shard)

        with ThreadPoolExecutor(THREADS, "checkpoint-range") as pool:
            for _ in pool.map(read, plan.items):
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are no identifiers: a reader is made for one folder."""
        return False


def read_table(files: Files) -> Metadata:
    """DCP's table of all shards.

    Raises:
        OSError: there is none, or it cannot be reached.
        ValueError: it cannot be understood.
    """
    content = files.read_bytes(METADATA)
    try:
        found = _TableUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # bytes that are no pickle may raise anything
        raise ValueError(f"{METADATA} cannot be read ({error or type(error).__name__})") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{METADATA} is not a table of shards")
    return found


class _TableUnpickler(pickle.Unpickler):
    """Reads DCP's table and nothing else: a pickle may otherwise run any code."""

    _METADATA = frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch": name == "Size" or isinstance(getattr(torch, name, None), torch.dtype),
            "torch.serialization": name == "_get_layout",
            "torch.distributed.checkpoint.filesystem": name == "_StorageInfo",
            "torch.distributed.checkpoint.metadata": name in self._METADATA,
        }
        if known.get(module):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
