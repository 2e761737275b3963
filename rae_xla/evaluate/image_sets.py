"""Image sets: images to measure, from ``.npz`` files, folders, shards or a sampler.

All processes of a run read a set together, each its share.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from rae_xla.data.image_decoding import IMAGE_EXTENSIONS, ImageError, decode_rgb
from rae_xla.data.image_finder import ImageNotes, LeftOut, find_files, no_images_message
from rae_xla.data.loader import one_pass
from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.shards.tar_faults import DamagedTarError, tar_fault
from rae_xla.data.shards.tar_samples import scan_images
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.evaluate.npz_images import NpzImages
from rae_xla.sample.images import Pixels
from rae_xla.sample.prompted_images import read_listing
from rae_xla.sample.sample_set import SET_FILE, SETTINGS_FILE
from rae_xla.sample.sampler import ImageSampler

READERS = 8
"""Threads that decode images; Pillow releases Python's lock."""


_OTHER = "not of the set"  # why an image is left out


class ImageSet(Protocol):
    """Square images of one size, in a fixed order."""

    @property
    def name(self) -> str:
        """Name for reports and error messages."""
        ...

    @property
    def count(self) -> int:
        """Number of images."""
        ...

    @property
    def side(self) -> int:
        """Height and width of the images, in pixels."""
        ...

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """Yield this process's images of each chunk.

        Args:
            rows: images in a chunk; the last chunk may have fewer.
            own: the rows of a chunk that this process reads.

        Yields:
            (n, 3, side, side) uint8, where n is at most the length of ``own`` and may be 0. Every
            process yields equally often.
        """
        ...


def open_images(path: str | Path, limit: int | None = None) -> ImageSet:
    """Open images that ``rae-xla sample`` or another tool has generated.

    Args:
        path: an ``.npz`` file with ``arr_0``, or a folder that contains images or tar files of
            images, at any depth. Images are sorted by number if all their names are numbers, and by
            path otherwise. In a folder of ``rae-xla sample`` or ``generate``, only the images of
            the set are read. What is not read is logged.
        limit: number of images to use, from the first; None for all.

    Raises:
        UserError: if there are no images, fewer than ``limit``, or an unfinished sample set.
    """
    path = Path(path).expanduser()
    images: NpzImageSet | FileImageSet
    if path.is_dir():
        images = _open_folder(path)
    elif not path.is_file():
        raise UserError(f"samples {path}: there is no such file or folder")
    elif path.suffix != ".npz" and not zipfile.is_zipfile(path):
        raise UserError(
            f"samples {path}: give an .npz file, or the folder of the images or of their tar files"
        )
    else:
        images = NpzImageSet(path)
    if limit is not None:
        if not 1 <= limit <= images.count:
            raise UserError(
                f"{limit} images were requested from {path}, which has {images.count}: give "
                f"--num-images 1 to {images.count}, or omit it for all"
            )
        images.count = limit
    return images


def first_images(index: ShardIndex, count: int | None, option: str = "--num-images ") -> ShardIndex:
    """Restrict a shard index to its first images.

    Args:
        index: the index.
        count: number of images; None for all.
        option: the option that sets the count, for the error message.

    Raises:
        UserError: if there are fewer than ``count``.
    """
    if count is None:
        return index
    if not 1 <= count <= len(index):
        raise UserError(
            f"{count} images were requested from {index.folder}, which has {len(index)}: give "
            f"{option}1 to {len(index)}, or omit it for all"
        )
    return replace(index, samples=index.samples[:count])


class NpzImageSet:
    """The first ``count`` images of an ``.npz`` file; an :class:`ImageSet`."""

    def __init__(self, path: Path, what: str = "samples") -> None:
        self._images = NpzImages(path, what)
        self.name, self.count, self.side = str(path), self._images.count, self._images.side

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See :class:`ImageSet`. Every process reads all images, because the file is a stream."""
        left = self.count
        for part in self._images.chunks(rows):
            if left <= 0:
                return
            yield part[:left][own]
            left -= len(part)


class FileImageSet:
    """The first ``count`` of several image files, loose or in tar files; an :class:`ImageSet`.

    Raises:
        UserError: while reading, if a file is not an image, or its size differs from the first.
    """

    def __init__(self, name: str, files: list[_File]) -> None:
        self.name, self.count, self._files = name, len(files), files
        first, _ = files[0].read()
        if first.shape[1] != first.shape[2]:
            raise UserError(
                f"{files[0]}: {first.shape[2]} x {first.shape[1]} pixels; samples must be square"
            )
        self.side = first.shape[1]

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See :class:`ImageSet`. Every process reads only its images, a few chunks ahead."""
        files = self._files[: self.count]
        parts = (files[start : start + rows][own] for start in range(0, len(files), rows))
        notes = ImageNotes()
        ahead = 1 + -(-2 * READERS // max(1, own.stop - own.start))
        pending: deque[tuple[list[_File], list[Future[tuple[Pixels, ImageNotes]]]]] = deque()
        with ThreadPoolExecutor(READERS) as readers:
            try:
                for part in parts:
                    pending.append((part, [readers.submit(file.read) for file in part]))
                    if len(pending) > ahead:
                        yield self._stack(*pending.popleft(), notes)
                while pending:
                    yield self._stack(*pending.popleft(), notes)
            finally:
                readers.shutdown(cancel_futures=True)
                notes.log(f"samples {self.name}")

    def _stack(
        self, part: list[_File], futures: list[Future[tuple[Pixels, ImageNotes]]], notes: ImageNotes
    ) -> Pixels:
        shape = (3, self.side, self.side)
        stacked = np.empty((len(part), *shape), np.uint8)
        for row, (file, future) in enumerate(zip(part, futures, strict=True)):
            image, of_image = future.result()
            notes.merge(of_image)
            if image.shape != shape:
                raise UserError(
                    f"{file}: {image.shape[2]} x {image.shape[1]} pixels, but the first image has "
                    f"{self.side} x {self.side}: give a folder of images of one size"
                )
            stacked[row] = image
        return stacked


class ShardImageSet:
    """The images of shards, centre-cropped to ``side`` pixels; an :class:`ImageSet`."""

    def __init__(self, index: ShardIndex, side: int, num_workers: int = 0) -> None:
        self.name, self.count, self.side = index.folder, len(index), side
        self._index, self._num_workers = index, num_workers

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See :class:`ImageSet`."""
        share = own.stop - own.start
        batches = one_pass(
            self._index,
            batch_size=rows,
            transform=CenterCrop(self.side),
            process_index=own.start // share,
            process_count=rows // share,
            num_workers=self._num_workers,
        )
        for batch in batches:
            yield batch["image"][batch["weight"] > 0].numpy()


class GeneratedImageSet:
    """The first ``count`` images of a seed, generated while they are measured; an ``ImageSet``.

    Classes are equally frequent. If their number divides ``count``, the images are those of
    ``rae-xla sample --labels equal``; otherwise some classes have one image more than others.

    Args:
        sampler: generates the images, on all processes together.
        count: number of images.
        side: height and width of an image, in pixels.
        num_classes: number of classes of the model.
        seed: seed of the set.
        batch_size: images generated at a time, rounded up to complete chunks.
        on_progress: called after every solver step.
    """

    name = "the generated samples"

    def __init__(
        self,
        sampler: ImageSampler,
        count: int,
        side: int,
        *,
        num_classes: int,
        seed: int,
        batch_size: int,
        on_progress: Callable[[], None],
    ) -> None:
        self.count, self.side = count, side
        self._sampler, self._seed, self._batch_size = sampler, seed, batch_size
        self._labels = torch.arange(count) * num_classes // count
        self._on_progress = on_progress

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See :class:`ImageSet`. All batches have one shape, so that nothing is compiled twice."""
        batch = -(-self._batch_size // rows) * rows
        for start in range(0, self.count, batch):
            indices = torch.arange(start, start + batch)
            labels = self._labels[indices.clamp_max(self.count - 1)]
            images = self._sampler(
                self._seed, indices.int(), labels, progress=lambda *_: self._on_progress()
            )
            images = images[: self.count - start].transpose(0, 3, 1, 2)
            for first in range(0, len(images), rows):
                yield np.ascontiguousarray(images[first : first + rows][own])


@dataclass(frozen=True)
class _File:
    """An image file, or a member of a tar file at ``offset``."""

    path: Path
    member: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def stem(self) -> str:
        return (self.member or self.path.name).rpartition("/")[2].rpartition(".")[0]

    def read(self) -> tuple[Pixels, ImageNotes]:
        """Return the pixels (3, H, W), and what is not read of the image."""
        notes = ImageNotes()
        try:
            if self.member is None:
                content = self.path.read_bytes()
            else:
                with self.path.open("rb") as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
            pixels = np.asarray(decode_rgb(content, str(self), notes)).transpose(2, 0, 1)
            return pixels, notes
        except (ImageError, OSError) as error:
            raise UserError(f"{self}: not a readable image ({error}): generate it again") from error

    def __str__(self) -> str:
        return f"{self.path}" if self.member is None else f"{self.path}: {self.member}"


def _open_folder(folder: Path) -> FileImageSet | NpzImageSet:
    left_out = LeftOut()
    found = _files_under(folder, left_out)
    files = sorted(found, key=lambda file: (str(file.path), file.offset))
    settings, expected = folder / SETTINGS_FILE, None
    if (listing := read_listing(folder)) is not None:
        expected = len(listing)
        files = _of_listing(folder, files, [name for name, _ in listing], left_out)
    elif settings.is_file():
        expected = _recorded_count(settings)
        files = _of_set(files, expected, left_out)
        if not files and (folder / SET_FILE).is_file():
            return NpzImageSet(folder / SET_FILE)
    if expected is not None and len(files) < expected:
        raise UserError(
            f"samples {folder}: the set is unfinished, with {len(files)} of {expected} images: "
            "repeat its command, which generates the rest"
        )
    if not files:
        raise UserError(
            f"samples {folder}: the folder contains no images, loose or in .tar files, at any "
            f"depth: {no_images_message(left_out)}"
        )
    left_out.log(f"samples {folder}")
    stems = {file.stem for file in files}
    if len(stems) == len(files) and all(stem.isdigit() for stem in stems):
        files.sort(key=lambda file: int(file.stem))
    return FileImageSet(str(folder), files)


def _of_set(files: list[_File], count: int | None, left_out: LeftOut) -> list[_File]:
    """Return the images of a sample set by their numbers; ``left_out`` gets the others.

    An interrupted packing leaves images in a tar file and in the folder that it was packed from.
    """
    of_set: dict[int, _File] = {}
    for file in files:
        if file.stem.isdecimal() and (count is None or int(file.stem) < count):
            of_set[int(file.stem)] = file
        else:
            left_out.add(_OTHER, str(file))
    return list(of_set.values())


def _of_listing(
    folder: Path, files: list[_File], listed: list[str], left_out: LeftOut
) -> list[_File]:
    """Return the images of a listing, in its order; ``left_out`` gets the others."""
    by_name = {os.path.relpath(str(file), folder): file for file in files}
    for name in by_name.keys() - set(listed):
        left_out.add(_OTHER, str(by_name[name]))
    return [by_name[name] for name in listed if name in by_name]


def _recorded_count(settings: Path) -> int | None:
    """Return the number of images of a sample set; None if its settings do not have it."""
    try:
        count = json.loads(settings.read_text(encoding="utf-8")).get("count")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{settings} cannot be read ({error}): generate the samples again"
        ) from None
    return count if isinstance(count, int) else None


def _files_under(folder: Path, left_out: LeftOut) -> Iterator[_File]:
    for name in find_files(folder, left_out, {*IMAGE_EXTENSIONS, "tar"}):
        path = Path(name)
        if path.suffix.lower() == ".tar":
            yield from _members(path, left_out)
        else:
            yield _File(path)


def _members(path: Path, left_out: LeftOut) -> Iterator[_File]:
    of_tar, count = LeftOut(), 0
    try:
        with path.open("rb") as file:
            for image in scan_images(file, of_tar):
                yield _File(path, image.name, image.offset, image.size)
                count += 1
    except (DamagedTarError, OSError) as error:
        raise UserError(f"samples {path}: {tar_fault(error, count)}") from error
    left_out.merge(of_tar)
