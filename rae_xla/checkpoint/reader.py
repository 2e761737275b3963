"""Read a sharded checkpoint into host tensors: a storage for DCP's ``load``."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from rae_xla.checkpoint.compat import StorageInfo
from rae_xla.checkpoint.format import METADATA_FILE, THREADS, Folder, error_reason
from rae_xla.runtime.snapshot import HostPart


def load(
    tensors: Mapping[str, Tensor], folder: Folder, needed: Mapping[str, HostPart] | None = None
) -> None:
    """Fill host tensors, however many processes and devices wrote the checkpoint.

    Args:
        tensors: by ``<part>/<name>``, unsharded, with the stored shapes. Only these are read.
        folder: of the checkpoint.
        needed: by ``<part>/<name>``, which part of a tensor must be filled: stored shards without
            any of it are not read. Tensors that are not named are filled.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file does not hold what ``.metadata`` describes.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        reader = ShardReader(folder, needed)
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        if isinstance(reason, OSError):
            raise reason from error
        raise ValueError(error_reason(reason)) from error


def stored_tensors(folder: Folder) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint on the meta device: shapes and dtypes without values.

    Raises:
        OSError: if ``.metadata`` does not exist or cannot be read.
        ValueError: if it is damaged.
    """
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class ShardReader(StorageReader):
    """Reads shards as ranges of files; see ``format`` for why not DCP's.

    Args:
        folder: of the checkpoint.
        needed: see ``load``.
    """

    def __init__(self, folder: Folder, needed: Mapping[str, HostPart] | None = None) -> None:
        self._folder, self._needed = folder, needed or {}
        self._ranges: dict[MetadataIndex, StorageInfo] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: a reader is used for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the table of all shards."""
        return read_metadata(self._folder)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the file ranges of the shards."""
        self._ranges = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan without the shards that this process does not need."""
        items = [item for item in plan.items if self._is_needed(item)]
        return dataclasses.replace(plan, items=items)

    def _is_needed(self, item: ReadItem) -> bool:
        part = self._needed.get(item.dest_index.fqn)
        return part is None or part.overlaps(item.dest_offsets, item.lengths)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the ranges of the plan, ``THREADS`` at a time."""

        def read(item: ReadItem) -> None:
            found = self._ranges[item.storage_index]
            content = self._folder.read_range(found.relative_path, found.offset, found.length)
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
        """Reject identifiers: a reader is constructed for its folder."""
        return False


def read_metadata(folder: Folder) -> Metadata:
    """Return DCP's table of all shards.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if it is damaged.
    """
    content = folder.read_bytes(METADATA_FILE)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # unpickling damaged bytes may raise any exception
        raise ValueError(
            f"{METADATA_FILE} cannot be read ({error or type(error).__name__})"
        ) from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA_FILE} is not a table of shards")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts the classes of DCP's table only: unpickling other classes could run any code."""

    _METADATA_CLASSES = frozenset(
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
        allowed = {
            "torch": name == "Size" or isinstance(getattr(torch, name, None), torch.dtype),
            "torch.serialization": name == "_get_layout",
            "torch.distributed.checkpoint.filesystem": name == "_StorageInfo",
            "torch.distributed.checkpoint.metadata": name in self._METADATA_CLASSES,
        }
        if allowed.get(module):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
