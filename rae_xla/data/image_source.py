"""Images that can be put into shards, wherever they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rae_xla.data.counter import Purpose, counter_hash
from rae_xla.data.encoding import Encoding, ShardSample
from rae_xla.data.worker_pool import ordered_map


@dataclass(frozen=True)
class ImageSource:
    """Images yet to be encoded: ``len`` of them, and how to get each.

    Args:
        items: what ``load`` needs to know of each sample, in the order of the shards.
        load: ``load(encoding, item)`` reads and encodes one; a pure function that pickles.
        classes: the name of every label.
        contents: a hash of the items and their order: equal ones name the same samples.
        encoding: what becomes of the images.
        workers: processes that read and encode.
    """

    items: Sequence[Any]
    load: Callable[[Encoding, Any], ShardSample]
    classes: tuple[str, ...]
    contents: str
    encoding: Encoding
    workers: int = 1

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[ShardSample]:
        return self.samples()

    def samples(self, start: int = 0) -> Generator[ShardSample, None, None]:
        """The encoded samples in order, from number ``start`` on."""
        items = (self.items[i] for i in range(start, len(self.items)))
        return ordered_map(partial(self.load, self.encoding), items, self.workers)


def sample_order(length: int, shuffle: bool) -> list[int]:
    """The numbers below ``length``, as they are or mixed (the same way every time)."""
    if not shuffle:
        return list(range(length))
    hashes = counter_hash(Purpose.SHARD_ORDER, np.arange(length, dtype=np.int64))
    return [int(i) for i in np.argsort(hashes, kind="stable")]


def hash_of(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 (hexadecimal) of a sequence of byte strings; where each ends counts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
