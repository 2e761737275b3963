"""Sets of pictures on disk, read by all processes together: ``.npz`` files, folders, shards."""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from rae_xla.data.index import ShardIndex
from rae_xla.data.reader import DECODE_ERRORS, IMAGE_EXTENSIONS
from rae_xla.data.stream import one_pass
from rae_xla.data.tar_samples import DamagedTar, scan_samples
from rae_xla.data.transforms import CenterCrop, to_rgb
from rae_xla.errors import UserError
from rae_xla.evaluate.npz_images import NpzImages
from rae_xla.sample.pictures import Pixels
from rae_xla.sample.sample_set import SETTINGS_FILE

READERS = 8
"""Threads that decode; Pillow lets them run side by side."""


class PictureSet(Protocol):
    """Pictures of one size, in an order of their own."""

    @property
    def name(self) -> str:
        """What to call it in reports and errors."""
        ...

    @property
    def count(self) -> int:
        """How many pictures there are."""
        ...

    @property
    def side(self) -> int:
        """Their height and width in pixels."""
        ...

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """The pictures (n, 3, side, side) that this process has in each chunk of ``rows``, at most
        as many as ``own`` has; every process gets equally many chunks.
        """
        ...


def open_pictures(path: str | Path, limit: int | None = None) -> PictureSet:
    """Open what ``rae-xla sample`` or another tool has drawn.

    Args:
        path: an ``.npz`` file with ``arr_0``, or a folder with pictures or tar files of pictures,
            at any depth. Pictures whose names are numbers come in the order of these, others in
            that of their paths. Of a folder of ``rae-xla sample`` only the samples count.
        limit: take the first so many.

    Raises:
        UserError: no pictures there, fewer than ``limit``, or a sample set that is not finished.
    """
    path = Path(path).expanduser()
    pictures: NpzPictures | FilePictures
    if path.is_dir():
        pictures = _open_folder(path)
    elif path.suffix == ".npz" or path.is_file():
        pictures = NpzPictures(path)
    else:
        raise UserError(f"samples {path}: there is no such file or folder")
    if limit is not None:
        if not 1 <= limit <= pictures.count:
            raise UserError(
                f"{limit} pictures cannot be had from {path}, which has {pictures.count}: give "
                f"--num-images 1 to {pictures.count}, or leave it out for all"
            )
        pictures.count = limit
    return pictures


class NpzPictures:
    """The first ``count`` images of an ``.npz`` file; see ``PictureSet``."""

    def __init__(self, path: Path, what: str = "samples") -> None:
        self._images = NpzImages(path, what)
        self.name, self.count, self.side = str(path), self._images.count, self._images.side

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See ``PictureSet``. Every process reads the file: its arrays allow nothing else."""
        left = self.count
        for part in self._images.chunks(rows):
            if left <= 0:
                return
            yield part[:left][own]
            left -= len(part)


class FilePictures:
    """The first ``count`` of image files, loose or in tar files; see ``PictureSet``.

    Raises:
        UserError: while reading, a file that is no picture, or one of another size.
    """

    def __init__(self, name: str, files: list[_File]) -> None:
        self.name, self.count, self._files = name, len(files), files
        first = files[0].read()
        if first.shape[1] != first.shape[2]:
            raise UserError(
                f"{files[0]}: {first.shape[2]} x {first.shape[1]} pixels; samples are square"
            )
        self.side = first.shape[1]

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See ``PictureSet``. Every process reads its own pictures alone, some chunks ahead."""
        files = self._files[: self.count]
        parts = (files[start : start + rows][own] for start in range(0, len(files), rows))
        ahead = 1 + -(-2 * READERS // max(1, own.stop - own.start))
        waiting: deque[tuple[list[_File], list[Future[Pixels]]]] = deque()
        with ThreadPoolExecutor(READERS) as readers:
            try:
                for part in parts:
                    waiting.append((part, [readers.submit(file.read) for file in part]))
                    if len(waiting) > ahead:
                        yield self._together(*waiting.popleft())
                while waiting:
                    yield self._together(*waiting.popleft())
            finally:
                readers.shutdown(cancel_futures=True)

    def _together(self, part: list[_File], read: list[Future[Pixels]]) -> Pixels:
        shape = (3, self.side, self.side)
        together = np.empty((len(part), *shape), np.uint8)
        for row, (file, future) in enumerate(zip(part, read, strict=True)):
            picture = future.result()
            if picture.shape != shape:
                raise UserError(
                    f"{file}: {picture.shape[2]} x {picture.shape[1]} pixels, the first has "
                    f"{self.side} x {self.side}"
                )
            together[row] = picture
        return together


class ShardPictures:
    """The images of training or validation shards, cut to ``side`` in the middle."""

    def __init__(self, index: ShardIndex, side: int, num_workers: int = 0) -> None:
        self.name, self.count, self.side = index.folder, len(index), side
        self._index, self._num_workers = index, num_workers

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See ``PictureSet``."""
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


@dataclass(frozen=True)
class _File:
    """An image file, or one that lies in a tar file at ``offset``."""

    path: Path
    member: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def stem(self) -> str:
        return (self.member or self.path.name).rpartition("/")[2].partition(".")[0]

    def read(self) -> Pixels:
        try:
            if self.member is None:
                content = self.path.read_bytes()
            else:
                with self.path.open("rb") as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(to_rgb(image)).transpose(2, 0, 1)
        except DECODE_ERRORS as error:
            raise UserError(f"{self}: not a readable picture: {error}") from error

    def __str__(self) -> str:
        return f"{self.path}" if self.member is None else f"{self.path}: {self.member}"


def _open_folder(folder: Path) -> FilePictures | NpzPictures:
    files = sorted(_files_under(folder), key=lambda file: (str(file.path), file.offset))
    settings = folder / SETTINGS_FILE
    if settings.is_file():
        # not its grid; and once what lies both in a folder and in the tar that is made of it
        files = list({file.stem: file for file in files if file.stem.isdigit()}.values())
        if not files and (folder / "samples.npz").is_file():
            return NpzPictures(folder / "samples.npz")
        wanted = json.loads(settings.read_text(encoding="utf-8")).get("count")
        if wanted is not None and len(files) < wanted:
            raise UserError(
                f"samples {folder}: {len(files)} pictures of {wanted} are there: give the same "
                "`rae-xla sample` command again, and it draws the rest"
            )
    if not files:
        raise UserError(
            f"samples {folder}: there are no pictures in it (.png and the like, loose or in .tar "
            "files), nor in the folders below"
        )
    stems = {file.stem for file in files}
    if len(stems) == len(files) and all(stem.isdigit() for stem in stems):
        files.sort(key=lambda file: int(file.stem))
    return FilePictures(str(folder), files)


def _files_under(folder: Path) -> Iterator[_File]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            extension = path.suffix.lower().removeprefix(".")
            if name.startswith("."):
                continue
            if extension == "tar":
                yield from _members(path)
            elif extension in IMAGE_EXTENSIONS:
                yield _File(path)


def _members(path: Path) -> Iterator[_File]:
    try:
        with path.open("rb") as file:
            for sample in scan_samples(file):
                if sample.has_image:
                    yield _File(path, sample.key, sample.offset, sample.size)
    except (DamagedTar, OSError) as error:
        raise UserError(f"samples {path}: not a whole tar file: {error}") from error
