"""Layout of a sharded checkpoint: the names of its files, and the folder that holds them.

A checkpoint has the layout of ``torch.distributed.checkpoint`` (DCP), which can read it. Every
process writes the shards it holds to one file per part, ``<part>-<process>.distcp``, and process 0
writes ``.metadata``, the table that maps each shard of each tensor to a range of a file. Tensors
are named ``<part>/<name>`` (``ema/blocks.0.attn.qkv.weight``). Because the parts have separate
files, reading the averaged weights touches none of the others.

DCP plans what to save and load. ``writer`` and ``reader`` replace its file-system classes because
those compute no checksums and commit by renaming, which a ``gs://`` bucket cannot do.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from rae_xla import storage

# DCP warns that a single process saves or loads without torch.distributed, which is intended here.
# Once, because warnings.catch_warnings is not safe in the saver's thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

METADATA_FILE = ".metadata"
"""DCP's table of all shards."""

SHARD_SUFFIX = ".distcp"

THREADS = 8
"""Files written, or ranges read, concurrently; one stream to a bucket reaches about 100 MB/s."""


@dataclass(frozen=True)
class Folder:
    """The files of one checkpoint.

    Attributes:
        path: local, or ``gs://``.
    """

    path: str

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file that appears, complete, when the block ends without an error."""
        return storage.create(storage.join(self.path, name))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from the offset ``start`` on."""
        return storage.read_range(storage.join(self.path, name), start, length)

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        return storage.read_bytes(storage.join(self.path, name))


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 (hexadecimal) of a file, as recorded in the manifest."""

    size: int
    sha256: str


def shard_file(part: str, process: int) -> str:
    """Return the name of the file with the shards of a part that a process wrote."""
    return f"{part}-{process}{SHARD_SUFFIX}"


def part_of_file(name: str) -> str | None:
    """Return the part whose shards a file holds, or None for any other file (``.metadata``)."""
    return name.rpartition("-")[0] if name.endswith(SHARD_SUFFIX) else None


def error_reason(error: BaseException) -> str:
    """Return the reason for an error that occurred while saving or loading.

    torch's zip writer reports a full disk as a ``RuntimeError`` that does not mention it.
    """
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):
        return "no space left, or a limit on file sizes"
    return str(error) or type(error).__name__
