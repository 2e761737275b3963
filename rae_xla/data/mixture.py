"""Training data from one source or from several, each with its share of every batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rae_xla.data import storage
from rae_xla.data.counter import Purpose, counter_hash
from rae_xla.data.index import ShardIndex, open_index
from rae_xla.data.order import SampleOrder, block_size
from rae_xla.data.rows import Part
from rae_xla.errors import UserError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources and their weights; samples are numbered through all of them in this order."""

    sources: tuple[ShardIndex, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @cached_property
    def fingerprint(self) -> str:
        """Of all content and weights (hexadecimal); of one source, its own."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        total = sum(self.weights)
        described = [
            [source.fingerprint, weight / total]
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def check_labels(self, num_classes: int) -> None:
        """Make sure that a model of so many classes can take every label of every source.

        Raises:
            UserError: a label is out of range, or two sources call different things by one label.
        """
        for source in self.sources:
            source.check_labels(num_classes)
        first = self.sources[0]
        for other in self.sources[1:]:
            if other.class_names != first.class_names:
                raise UserError(
                    f"data.train: the classes of {first.folder} and {other.folder} differ, so one "
                    "label would mean two things: make their shards with one --classes map"
                )

    def rows(self, global_batch_size: int) -> list[int]:
        """How many rows of every global batch each source gives: its weight, rounded.

        Raises:
            UserError: the batch has no row for some source.
        """
        total = sum(self.weights)
        exact = [global_batch_size * weight / total for weight in self.weights]
        rows = [int(share) for share in exact]
        by_rest = sorted(range(len(rows)), key=lambda i: (rows[i] - exact[i], i))
        for i in by_rest[: global_batch_size - sum(rows)]:
            rows[i] += 1
        for source, share in zip(self.sources, rows, strict=True):
            if share == 0:
                raise UserError(
                    f"data.weights: by its weight {source.folder} has no row in a batch of "
                    f"{global_batch_size}: raise its weight or training.global_batch_size"
                )
        return rows

    def shares(self, global_batch_size: int) -> str:
        """For people: ``of each 256 rows 179 from a, 77 from b``."""
        rows = zip(self.rows(global_batch_size), self.sources, strict=True)
        shares = ", ".join(f"{share} from {source.folder}" for share, source in rows)
        return f"of each {global_batch_size} rows {shares}"

    def parts(self, global_batch_size: int, seed: int, shuffle: bool) -> tuple[Part, ...]:
        """The sources with the order of their samples and their place in the global batch.

        Raises:
            UserError: a source has fewer samples than rows in a batch.
        """
        parts, row, number = [], 0, 0
        for i, (source, rows) in enumerate(
            zip(self.sources, self.rows(global_batch_size), strict=True)
        ):
            # Of two sources, the same number of a sample must not mean the same crop.
            own_seed = seed if i == 0 else int(counter_hash(seed, Purpose.SOURCE, i)[0] >> 1)
            block = block_size(len(source), source.num_bytes)
            order = SampleOrder(len(source), rows, own_seed, block, shuffle)
            parts.append(Part(source, order, row, number))
            row, number = row + rows, number + len(source)
        return tuple(parts)


def open_training_data(
    train: str | Sequence[str], weights: Sequence[float] | None = None
) -> Mixture:
    """Open what ``data.train`` names: a folder of shards, or several and their weights.

    Raises:
        UserError: a folder cannot be used (see ``open_index``), or the weights do not fit.
    """
    folders = [train] if isinstance(train, str) else list(train)
    if not folders:
        raise UserError("data.train names no shards: give a folder, or a list of them")
    if weights is None:
        weights = [1.0] * len(folders)
    if len(weights) != len(folders):
        raise UserError(
            f"data.weights has {len(weights)} numbers, data.train has {len(folders)} folders: give "
            "one for each"
        )
    for folder, weight in zip(folders, weights, strict=True):
        if not 0 < weight < math.inf:
            raise UserError(f"data.weights: that of {folder} is {weight}; it must be above 0")
    sources = tuple(open_index(folder) for folder in folders)
    opened = [storage.real_path(source.folder) for source in sources]
    if twice := [folder for folder in opened if opened.count(folder) > 1]:
        raise UserError(f"data.train names {twice[0]} twice: give it once, and more weight")
    return Mixture(sources, tuple(weights))
