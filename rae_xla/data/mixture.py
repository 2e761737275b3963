"""Training data from one or several sources, each with a fixed share of every batch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.counter_rng import Purpose, counter_hash
from rae_xla.data.sampler import BatchSampler, block_size
from rae_xla.data.shards.index import ShardIndex, open_index
from rae_xla.data.shards.texts import TextTable, has_texts, open_texts
from rae_xla.data.source_rows import SourceRows
from rae_xla.errors import UserError

Arrange = Callable[[Sequence[int]], Sequence[NDArray[np.int64]]]
"""Returns the rows of every source in a batch, from their numbers."""


def one_after_another(shares: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return the rows of every source of a batch in which one source follows another."""
    return np.split(np.arange(sum(shares)), np.cumsum(shares)[:-1])


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
        self, global_batch_size: int, seed: int, shuffle: bool, arrange: Arrange | None = None
    ) -> tuple[SourceRows, ...]:
        """Return the order of every source's samples and its rows in the global batch.

        Args:
            global_batch_size: rows of a step over all processes.
            seed: of the run.
            shuffle: use a new order in every epoch rather than the order of the index.
            arrange: returns the rows of each source, ascending, for the number of rows of each;
                by default one source follows another.

        Raises:
            UserError: a source has fewer samples than rows in a batch.
        """
        shares = self.rows_per_source(global_batch_size)
        positions = (arrange or one_after_another)(shares)
        parts, number = [], 0
        for i, (source, rows) in enumerate(zip(self.sources, shares, strict=True)):
            # Sample k of two sources must not get the same crop.
            own_seed = seed if i == 0 else int(counter_hash(seed, Purpose.SOURCE, i)[0] >> 1)
            first_image = self.first_image(i)
            count = len(source) if first_image is None else len(first_image) - 1
            if count < rows:
                part = "one global batch" if rows == global_batch_size else f"its {rows} rows"
                raise UserError(
                    f"{source.folder}: {count} samples, fewer than {part} of {global_batch_size}: "
                    "lower training.global_batch_size or add data"
                )
            block = block_size(count, source.num_bytes)
            sampler = BatchSampler(count, rows, own_seed, block, shuffle)
            parts.append(SourceRows(source, sampler, positions[i], number, first_image))
            number += count
        return tuple(parts)

    def first_image(self, source: int) -> NDArray[np.int64] | None:
        """Return the first image of every sample of a source, and the number of all its images.

        None: sample i has image i.
        """
        return None


@dataclass(frozen=True, eq=False)
class CaptionedMixture(Mixture):
    """Sources of images with captions; ``texts`` has the table of each source."""

    texts: tuple[TextTable, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Hash (hexadecimal) of all content and weights, texts included."""
        described = [super().fingerprint, *(table.fingerprint for table in self.texts)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.texts))

    def first_image(self, source: int) -> NDArray[np.int64] | None:
        """See ``Mixture``."""
        return self.texts[source].first_image

    def text_tables(self) -> dict[int, TextTable]:
        """Return the texts of every source by the number of its first sample."""
        tables, first = {}, 0
        for table in self.texts:
            tables[first] = table
            first += len(table)
        return tables

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """Name of every source for metrics: that of its folder, numbered where two are equal."""
        names: list[str] = []
        for table in self.texts:
            name = storage.split(table.folder.rstrip("/"))[1] or "data"
            name = re.sub(r"[^\w.-]", "_", name)
            number = sum(other == name or other.startswith(f"{name}.") for other in names)
            names.append(f"{name}.{number}" if number else name)
        return tuple(names)


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
    if not any(has_texts(folder) for folder in folders):
        return Mixture(sources, tuple(weights))
    tables = (open_texts(f, len(s)) for f, s in zip(folders, sources, strict=True))
    return CaptionedMixture(sources, tuple(weights), tuple(tables))
