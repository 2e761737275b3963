"""``ImageSource``: images to write to shards, whatever their origin."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rae_xla.data.counter_rng import Purpose, counter_hash
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.worker_pool import ordered_map


@dataclass(frozen=True)
class ImageSource:
    """Images to be read and encoded; ``len`` is their number.

    Args:
        items: what ``load`` needs for each sample, in the order of the shards.
        load: ``load(encoding, item)`` reads and encodes one sample; a pure function that pickles.
        classes: the name of every label.
        contents: hash of the items and their order, to recognise the same samples.
        encoding: how images are encoded.
        workers: number of processes that read and encode.
        captioned: whether the samples have texts rather than labels.
        dropped: number of samples that were left out, by reason.
        first_dropped: name of the first one, by reason.
    """

    items: Sequence[Any]
    load: Callable[[Encoding, Any], ShardSample]
    classes: tuple[str, ...]
    contents: str
    encoding: Encoding
    workers: int = 1
    captioned: bool = False
    dropped: Mapping[str, int] = field(default_factory=dict)
    first_dropped: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[ShardSample]:
        return self.samples()

    def samples(self, start: int = 0) -> Generator[ShardSample, None, None]:
        """Yield the encoded samples in order, from number ``start`` on."""
        items = (self.items[i] for i in range(start, len(self.items)))
        return ordered_map(partial(self.load, self.encoding), items, self.workers)


def sample_order(length: int, shuffle: bool) -> list[int]:
    """Return the numbers below ``length``, in order or shuffled (always the same way)."""
    if not shuffle:
        return list(range(length))
    hashes = counter_hash(Purpose.SHARD_ORDER, np.arange(length, dtype=np.int64))
    return [int(i) for i in np.argsort(hashes, kind="stable")]


def hash_of(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 (hexadecimal) of byte strings and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
