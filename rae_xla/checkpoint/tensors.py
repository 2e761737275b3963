"""Tensors of a checkpoint: of a sharded one, part by part, or of a file of weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_xla import storage
from rae_xla.checkpoint.format import METADATA_FILE
from rae_xla.checkpoint.manager import (
    CHECKPOINTS_FOLDER,
    BrokenCheckpointError,
    Checkpoint,
    broken_if_unreadable,
    find_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.reader import load, stored_tensors
from rae_xla.errors import UserError
from rae_xla.models.weights import read_weight_file
from rae_xla.runtime.snapshot import HostPart

PartTensors = dict[str, dict[str, Tensor]]
"""Part (``model``, ``ema``, ``optimizer``, ...) -> name -> tensor."""


def stored_parts(checkpoint: Checkpoint) -> PartTensors:
    """Return the tensors of a checkpoint on the meta device, without reading their values.

    Raises:
        BrokenCheckpointError: if the table of shards is missing or damaged.
        OSError: if a bucket cannot be reached.
    """
    try:
        with broken_if_unreadable(checkpoint, METADATA_FILE):
            return _group_by_part(stored_tensors(checkpoint.folder))
    except ValueError as error:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {error}") from error


def read_parts(
    checkpoint: Checkpoint, parts: Collection[str], needed: Mapping[str, HostPart] | None = None
) -> PartTensors:
    """Read the tensors of some parts to the host; the files of other parts are not opened.

    Args:
        checkpoint: to read.
        parts: names of the parts.
        needed: by ``<part>/<name>``, the part of a tensor that is needed; the values of the rest
            are undefined. None: all.

    Raises:
        BrokenCheckpointError: if a file does not hold what the table of shards describes.
        OSError: if a bucket cannot be reached.
    """
    stored = {part: of for part, of in stored_parts(checkpoint).items() if part in parts}
    tensors = {
        f"{part}/{name}": torch.empty_like(tensor, device="cpu")
        for part, of in stored.items()
        for name, tensor in of.items()
    }
    try:
        load(tensors, checkpoint.folder, needed)
    except ValueError as error:
        raise BrokenCheckpointError(f"checkpoint {checkpoint} is broken: {error}") from error
    return _group_by_part(tensors)


def _group_by_part(tensors: Mapping[str, Tensor]) -> PartTensors:
    parts: PartTensors = {}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts


class CheckpointContent(Mapping[str, Any]):
    """A sharded checkpoint as a mapping with the keys of a published ``.pt`` checkpoint.

    The keys are ``step``, ``config``, ``scheduler`` and the parts. A part is verified and read
    each time it is accessed.

    Raises:
        UserError: on construction or access, if the checkpoint is broken or cannot be reached.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        try:
            manifest = read_checkpoint_manifest(checkpoint)
            verify(checkpoint, manifest, parts=())
            self._parts = tuple(stored_parts(checkpoint))
        except OSError as error:
            raise _read_error(checkpoint, error) from error
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
            raise _read_error(self.checkpoint, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter((*self._facts, *self._parts))

    def __len__(self) -> int:
        return len(self._facts) + len(self._parts)

    def __contains__(self, key: object) -> bool:
        return key in self._facts or key in self._parts


def _read_error(checkpoint: Checkpoint, error: OSError) -> UserError:
    return UserError(
        f"checkpoint {checkpoint} cannot be read ({error}): check the access to its files"
    )


def find_weights(path: str | Path, what: str = "checkpoint") -> str:
    """Return the path of the file of weights, or of the checkpoint, that a path refers to.

    Args:
        path: a ``.pt`` or ``.safetensors`` file, a folder written by ``save_pretrained``, a
            checkpoint ``step-…``, or a folder of checkpoints or a results folder, which refer to
            the newest; local or ``gs://``.
        what: the option or setting that gave the path, for error messages.

    Raises:
        UserError: if a folder holds no checkpoint or cannot be listed.
    """
    if not storage.is_remote(str(path)):
        local = Path(path).expanduser()
        if not local.is_dir():
            return str(path)
        if (saved := local / "model.safetensors").is_file():  # written by save_pretrained
            return str(saved)
    if found := find_checkpoints(path):
        return str(found[-1])
    if files := _single_file_checkpoints(path):
        return str(files[-1])
    raise UserError(
        f"{what}: {path} holds no checkpoint: give a file of weights, a folder step-…, a folder "
        "that holds such folders, or a results folder"
    )


def open_weights(path: str | Path, what: str = "checkpoint") -> Any:
    """Open what ``find_weights`` finds.

    Args:
        path: as for ``find_weights``.
        what: the option or setting that gave the path, for error messages.

    Returns:
        The content of a file, or a ``CheckpointContent``.

    Raises:
        UserError: if there are no weights, or they cannot be read.
    """
    found = find_weights(path, what)
    if storage.is_remote(found) or Path(found).expanduser().is_dir():
        return CheckpointContent(Checkpoint(found))
    return read_weight_file(found, what)


def _single_file_checkpoints(results: str | Path) -> list[Path]:
    """Return the checkpoints that early versions wrote as single files, oldest first."""
    return sorted((Path(results).expanduser() / CHECKPOINTS_FOLDER).glob("step-????????.pt"))
