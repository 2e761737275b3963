"""Training data from one or several sources, each with a fixed share of every batch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rae_xla import storage
from rae_xla.data.batch_builder import SourceRows
from rae_xla.data.counter_rng import Purpose, counter_hash
from rae_xla.data.sampler import BatchSampler, block_size
from rae_xla.data.shards.index import ShardIndex, open_index
from rae_xla.errors import UserError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources of training data and their weights.

    Samples are numbered consecutively through all sources; ``len`` is their number.
    """

    sources: tuple[ShardIndex, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hexadecimal) of all content and weights; for one source, the hash of its index."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        total = sum(self.weights)
        described = [
            [source.fingerprint, weight / total]
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def check_labels(self, num_classes: int) -> None:
        """Raise if a model with ``num_classes`` classes cannot be trained on the labels.

        Raises:
            UserError: a label is out of range, or the classes of two sources differ.
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

    def rows_per_source(self, global_batch_size: int) -> list[int]:
        """Return the number of rows of a global batch that each source gets: its rounded weight.

        Raises:
            UserError: a source gets no row.
        """
        total = sum(self.weights)
        exact = [global_batch_size * weight / total for weight in self.weights]
        rows = [int(share) for share in exact]
        by_remainder = sorted(range(len(rows)), key=lambda i: (rows[i] - exact[i], i))
        for i in by_remainder[: global_batch_size - sum(rows)]:
            rows[i] += 1
        for source, share in zip(self.sources, rows, strict=True):
            if share == 0:
                raise UserError(
                    f"data.weights: the weight of {source.folder} gives it no row in a batch of "
                    f"{global_batch_size}: raise it, or training.global_batch_size"
                )
        return rows

    def describe_shares(self, global_batch_size: int) -> str:
        """Return a line for the log: ``of each 256 rows, 179 from a, 77 from b``."""
        rows = zip(self.rows_per_source(global_batch_size), self.sources, strict=True)
        shares = ", ".join(f"{share} from {source.folder}" for share, source in rows)
        return f"of each {global_batch_size} rows, {shares}"

    def source_rows(
        self, global_batch_size: int, seed: int, shuffle: bool
    ) -> tuple[SourceRows, ...]:
        """Return the order of every source's samples and its rows in the global batch.

        Raises:
            UserError: a source has fewer samples than rows in a batch.
        """
        parts, row, number = [], 0, 0
        for i, (source, rows) in enumerate(
            zip(self.sources, self.rows_per_source(global_batch_size), strict=True)
        ):
            # Sample k of two sources must not get the same crop.
            own_seed = seed if i == 0 else int(counter_hash(seed, Purpose.SOURCE, i)[0] >> 1)
            block = block_size(len(source), source.num_bytes)
            sampler = BatchSampler(len(source), rows, own_seed, block, shuffle)
            parts.append(SourceRows(source, sampler, row, number))
            row, number = row + rows, number + len(source)
        return tuple(parts)


def open_training_data(
    train: str | Sequence[str], weights: Sequence[float] | None = None
) -> Mixture:
    """Open the folders of ``data.train``.

    Args:
        train: a folder of shards, or several.
        weights: one for each folder; None: equal weights.

    Raises:
        UserError: a folder cannot be used (see ``open_index``), or the weights do not match.
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
            raise UserError(f"data.weights: the weight of {folder} is {weight}; it must be above 0")
    sources = tuple(open_index(folder) for folder in folders)
    opened = [storage.real_path(source.folder) for source in sources]
    if twice := [folder for folder in opened if opened.count(folder) > 1]:
        raise UserError(f"data.train names {twice[0]} twice: give it once, with a larger weight")
    return Mixture(sources, tuple(weights))
