"""Building the rows of a batch: a pure function of the step, with NumPy and Pillow alone.

Worker processes import this module. Without torch they start in a fraction of a second and need a
tenth of the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.bad_samples import (
    MAX_REPLACEMENTS,
    MAX_UNREACHABLE,
    BadSample,
    SampleError,
    replacement,
)
from rae_xla.data.counter_rng import Purpose, uniform
from rae_xla.data.image_stack import ImageStack
from rae_xla.data.sampler import SampleIds
from rae_xla.data.source_rows import SourceReader, SourceRows, source_readers
from rae_xla.data.transforms import Pixels, Transform, flip
from rae_xla.errors import ConnectionLostError, UserError
from rae_xla.storage.cache import RangeCache

Arrays = dict[str, NDArray[Any]]
"""``image`` uint8 (b, 3, H, W), ``label`` and ``index`` int64 (b,), optionally ``weight``
float32 (b,), and the arrays of ``RowArrays``; with these and several sources also ``source`` int32
(b,), their numbers."""

LOOK_AHEAD = 512
"""Samples that a worker reads ahead: 170 ms of work at 3,000 samples per second."""


class BuiltRows(NamedTuple):
    """Rows of one step, and the bad samples that were replaced in them."""

    arrays: Arrays
    bad: list[BadSample]


class BatchBuilder(Protocol):
    """Builds the same rows of one step after another."""

    def build(self, step: int) -> BuiltRows:
        """Return the rows of a step."""
        ...

    def close(self) -> None:
        """Stop the read-ahead."""
        ...


class BatchSpec(Protocol):
    """What the batches of a run hold; it pickles, and every worker opens its own builder."""

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> BatchBuilder:
        """Return a builder of rows ``first:last`` of every step.

        Args:
            first: first row.
            last: row after the last.
            look_ahead: number of samples that it reads ahead when steps follow one another.
        """
        ...


class RowArrays(Protocol):
    """Makes further arrays of a row, such as tokens of a caption; it pickles.

    Attributes:
        images_per_row: image slots of a row. With 1 the batch has ``image`` (b, 3, H, W), otherwise
            (b, slots, 3, H, W) with zeros in unused slots.
    """

    images_per_row: int

    def arrange(self, shares: Sequence[int]) -> Sequence[NDArray[np.int64]]:
        """Return the rows of every source in a global batch, from their numbers."""
        ...

    def arrays(self, first_id: int, sample: int, epoch: int, row: int) -> Arrays:
        """Return the arrays of one row, without the dimension of rows.

        Args:
            first_id: see ``SourceRows``.
            sample: number in its source.
            epoch: of the step.
            row: number in the global batch.

        Raises:
            SampleError: the sample cannot be used.
        """
        ...


@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """Shuffled, cropped and flipped samples; bad samples are replaced."""

    sources: tuple[SourceRows, ...]
    transform: Transform
    flip: bool
    cache: RangeCache | None = None
    row_arrays: RowArrays | None = None

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> BatchBuilder:
        """See ``BatchSpec``."""
        return _TrainingBuilder(self, first, last, look_ahead)


class _TrainingBuilder:
    def __init__(self, spec: TrainingBatches, first: int, last: int, look_ahead: int) -> None:
        self._transform, self._flip = spec.transform, spec.flip
        self._first, self._count = first, last - first
        self._row_arrays = spec.row_arrays
        self._names_sources = spec.row_arrays is not None and len(spec.sources) > 1
        self._readers = list(source_readers(spec.sources, first, last, look_ahead, spec.cache))

    def build(self, step: int) -> BuiltRows:
        slots = 1 if self._row_arrays is None else self._row_arrays.images_per_row
        images = ImageStack(self._count, slots)
        ids = np.empty(self._count, np.int64)
        labels = np.empty(self._count, np.int64)
        sources = np.zeros(self._count, np.int32)
        rows: list[Arrays] = [{}] * self._count
        bad: list[BadSample] = []
        for source in self._readers:
            source.read_ahead(step)
            here, chosen = self._build_part(source, step, images, rows, bad)
            ids[here] = chosen + source.rows.first_id
            labels[here] = source.labels(chosen)
            sources[here] = source.number
        arrays: Arrays = {
            "image": images.complete(self._transform),
            "label": labels,
            "index": ids,
            **{name: np.stack([row[name] for row in rows]) for name in rows[0]},
        }
        if self._names_sources:
            arrays["source"] = sources
        return BuiltRows(arrays, bad)

    def _build_part(
        self,
        source: SourceReader,
        step: int,
        images: ImageStack,
        rows: list[Arrays],
        bad: list[BadSample],
    ) -> tuple[NDArray[np.int64], SampleIds]:
        """Set the images and further arrays of one source, and add its bad samples to ``bad``.

        Returns:
            Its rows among those of this builder, and the samples in them.
        """
        sampler = source.rows.sampler
        seed, epoch = sampler.seed, sampler.epoch(step)
        ids = source.sample_ids(step)
        crops = [uniform(seed, p, epoch, ids) for p in (Purpose.CROP_X, Purpose.CROP_Y)]
        flips = (uniform(seed, Purpose.FLIP, epoch, ids) < 0.5) & self._flip
        draws = zip(*(crop.tolist() for crop in crops), flips.tolist(), strict=True)
        here = source.positions - self._first
        for i, (sample, (x, y, flipped)) in enumerate(zip(ids.tolist(), draws, strict=True)):
            wanted = _Wanted(step, epoch, sample, int(source.positions[i]), (x, y))
            pixels, ids[i], further = self._load(source, wanted, bad)
            for slot, image in enumerate(pixels):
                images.put(int(here[i]), slot, flip(image) if flipped else image)
            rows[here[i]] = further
        return here, ids

    def _load(
        self, source: SourceReader, wanted: _Wanted, bad: list[BadSample]
    ) -> tuple[list[Pixels], int, Arrays]:
        """Return images, number and arrays of a sample, or of the sample that replaces it."""
        step, epoch, sample = wanted.step, wanted.epoch, wanted.sample
        rows, seed, candidate = source.rows, source.rows.sampler.seed, sample
        in_a_row: list[BadSample] = []
        unreachable = 0
        for attempt in range(MAX_REPLACEMENTS + 1):
            try:
                further: Arrays = {}
                if self._row_arrays is not None:  # first: it costs less than the image
                    first_id = rows.first_id
                    further = self._row_arrays.arrays(first_id, candidate, epoch, wanted.row)
                numbers = rows.images_of(np.array([candidate])).tolist()
                load = source.reader.load
                pixels = [load(epoch, number, self._transform, wanted.u) for number in numbers]
            except SampleError as error:
                following = replacement(seed, epoch, sample, attempt, rows.sampler.num_samples)
                path, offset = rows.describe_place(candidate)
                in_a_row.append(
                    BadSample(step, epoch, candidate, path, offset, error.reason, following)
                )
                candidate = following
                unreachable += error.unreachable
                if unreachable == MAX_UNREACHABLE:
                    break
            else:
                bad += [dataclasses.replace(sample, replaced_by=candidate) for sample in in_a_row]
                return pixels, candidate, further
        lost = unreachable == MAX_UNREACHABLE
        raise (ConnectionLostError if lost else UserError)(
            f"{rows.index.folder}: {len(in_a_row)} samples in a row cannot be used, so nothing can "
            f"be read: {in_a_row[0].reason}; {in_a_row[1].reason}; … Restore access to the shards "
            "and start the run again: it resumes from its last checkpoint"
        )

    def close(self) -> None:
        for source in self._readers:
            source.reader.close()


class _Wanted(NamedTuple):
    """A row to load: step, epoch, number of the sample and of the row, uniforms of the crop."""

    step: int
    epoch: int
    sample: int
    row: int
    u: tuple[float, float]
