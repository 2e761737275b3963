"""The tensors of a checkpoint: of a sharded one, part by part, or of a ``.pt`` file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_xla.data import storage
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import (
    BrokenCheckpointError,
    Checkpoint,
    find_checkpoints,
    read_manifest,
    verify,
)
from rae_xla.models.weights import read_weight_file
from rae_xla.runtime import checkpoint as sharded

PartTensors = dict[str, dict[str, Tensor]]
"""Part (``model``, ``ema``, ``optimizer`` …) -> name -> tensor."""


def stored_parts(checkpoint: Checkpoint) -> PartTensors:
    """What a checkpoint holds: tensors on the meta device.

    Raises:
        BrokenCheckpointError: its table of shards cannot be read.
        OSError: a bucket cannot be reached.
    """
    try:
        return _by_part(sharded.stored_tensors(checkpoint.folder))
    except ValueError as error:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {error}") from error


def read_parts(checkpoint: Checkpoint, parts: Collection[str]) -> PartTensors:
    """Read whole tensors to the host; the files of other parts are not touched.

    Raises:
        BrokenCheckpointError: they are not what the table of shards says.
        OSError: a bucket cannot be reached.
    """
    stored = {part: of for part, of in stored_parts(checkpoint).items() if part in parts}
    tensors = {
        f"{part}/{name}": torch.empty_like(tensor, device="cpu")
        for part, of in stored.items()
        for name, tensor in of.items()
    }
    try:
        sharded.load(tensors, checkpoint.folder)
    except ValueError as error:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {error}") from error
    return _by_part(tensors)


def _by_part(tensors: Mapping[str, Tensor]) -> PartTensors:
    parts: PartTensors = {}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


class CheckpointContent(Mapping[str, Any]):
    """A sharded checkpoint as the dict a ``.pt`` file would hold: ``step``, ``config``,
    ``scheduler``, and the parts, each of which is checked and read when it is asked for.

    Raises:
        UserError: from asking, too: the checkpoint is broken or cannot be reached.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        try:
            manifest = read_manifest(checkpoint)
            verify(checkpoint, manifest, parts=())  # the table of shards
            self._parts = tuple(stored_parts(checkpoint))
        except OSError as error:
            raise _unreachable(checkpoint, error) from error
        self._manifest = manifest
        self._facts = {key: manifest[key] for key in ("step", "config", "scheduler")}

    def __getitem__(self, key: str) -> Any:
        if key in self._facts:
            return self._facts[key]
        if key not in self._parts:
            raise KeyError(key)
        try:
            verify(self.checkpoint, self._manifest, parts=(key,))
            return read_parts(self.checkpoint, (key,))[key]
        except OSError as error:
            raise _unreachable(self.checkpoint, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter((*self._facts, *self._parts))

    def __len__(self) -> int:
        return len(self._facts) + len(self._parts)

    def __contains__(self, key: object) -> bool:
        return key in self._facts or key in self._parts


def _unreachable(checkpoint: Checkpoint, error: OSError) -> UserError:
    return UserError(f"checkpoint {checkpoint} cannot be read: {error}")


def find_weights(path: str | Path, what: str = "checkpoint") -> str:
    """The file or the sharded checkpoint that a path to weights stands for.

    Args:
        path: a ``.pt`` or ``.safetensors`` file, a folder that ``save_pretrained`` wrote, a folder
            ``step-…``, or a folder of those or a results folder, which stand for the newest; local
            or ``gs://``.
        what: what to call it in errors.

    Raises:
        UserError: it is a folder without checkpoints, or cannot be reached.
    """
    if not storage.is_remote(str(path)):
        local = Path(path).expanduser()
        if not local.is_dir():
            return str(path)
        if (saved := local / "model.safetensors").is_file():
            return str(saved)  # a folder that save_pretrained wrote
    if found := find_checkpoints(path):
        return str(found[-1])
    if files := _old_checkpoints(path):
        return str(files[-1])
    raise UserError(
        f"{what}: {path} holds no checkpoint: give a file of weights, a folder "
        "step-…, the folder of such folders, or a results folder"
    )


def open_weights(path: str | Path, what: str = "checkpoint") -> Any:
    """The content of what ``find_weights`` finds: a file's, or a ``CheckpointContent``.

    Raises:
        UserError: there is nothing of the kind, or it cannot be read.
    """
    found = find_weights(path, what)
    if storage.is_remote(found) or Path(found).expanduser().is_dir():
        return CheckpointContent(Checkpoint(found))
    return read_weight_file(found, what)


def _old_checkpoints(path: str | Path) -> list[Path]:
    """Files of the time when a checkpoint was one file, in a results folder; oldest first."""
    return sorted((Path(path).expanduser() / "checkpoints").glob("step-????????.pt"))
