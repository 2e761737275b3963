"""Files of a sample set: PNGs, loose or a thousand to a tar file, and one ``.npz`` of them all."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.errors import UserError
from rae_xla.sample.images import Pixels, save_png

SHARD = 1000
"""Images in a folder or tar file."""

_READ_BLOCK = 64  # images that are read back at a time


class ImageFiles:
    """The image files of a sample set, in one of three layouts.

    ``flat``: ``000123.png``. ``folders``: ``000/000123.png``. ``tar``: the same as ``folders``
    while images are generated; then :meth:`pack` turns each folder into a tar file, ``000.tar``.

    Args:
        out: the set's folder, local or ``gs://``.
        layout: ``flat``, ``folders`` or ``tar``.
        count: number of images in the set.
    """

    def __init__(self, out: str | Path, layout: str, count: int) -> None:
        self._out, self._layout = StoragePath(out), layout
        self.count = count

    def path(self, i: int) -> StoragePath:
        """Return the path that image i is written to."""
        name = f"{i:06d}.png"
        return self._out / name if self._layout == "flat" else self._folder(i // SHARD) / name

    def existing(self) -> set[int]:
        """Return the indices of the images that exist; each of them is complete."""
        indices: set[int] = set()
        top = storage.list_files(self._out) if storage.exists(self._out) else {}
        for shard in range(-(-self.count // SHARD)):
            if self._tar(shard).name in top:
                indices.update(self._members(shard))
        if self._layout == "flat":
            indices.update(_numbers(top))
        else:
            for name in storage.list_folders(self._out):
                if name.isdecimal():
                    indices.update(_numbers(storage.list_files(self._out / name)))
        return {i for i in indices if i < self.count}

    def make_folders(self) -> None:
        """Create every folder that images are written to."""
        for i in range(0, self.count, SHARD):
            storage.make_folder(self.path(i).parent)

    def read(self, i: int) -> bytes:
        """Return the bytes of image i's PNG."""
        path = self.path(i)
        if self._layout != "tar" or storage.exists(path):
            return storage.read_bytes(path)
        tar_path = self._tar(i // SHARD)
        # A member is found by seeking, which a stream from a bucket cannot do.
        content = io.BytesIO(storage.read_bytes(tar_path)) if tar_path.is_remote else None
        with tarfile.open(tar_path, fileobj=content) as tar:
            return _read_member(tar, path.name)

    def pixels(self, i: int) -> Pixels:
        """Return image i, (H, W, 3).

        Raises:
            UserError: the image is damaged or missing; names its file.
        """
        try:
            return np.asarray(decode_rgb(self.read(i)))
        except (ImageError, OSError, KeyError, tarfile.TarError) as error:
            path = self.path(i)
            where = path if storage.exists(path) else f"{self._tar(i // SHARD)}: {path.name}"
            raise UserError(
                f"{where}: not a readable image ({error}): remove the file and repeat the command, "
                "which generates its images again"
            ) from error

    def images(self, workers: int) -> Iterator[Pixels]:
        """Yield all images (H, W, 3) in order; only a block of them is in memory at a time.

        Raises:
            UserError: as for :meth:`pixels`.
        """
        with ThreadPoolExecutor(workers) as threads:
            for start in range(0, self.count, _READ_BLOCK):
                block = range(start, min(start + _READ_BLOCK, self.count))
                yield from threads.map(self.pixels, block)

    def pack(self) -> None:
        """Turn folders into tar files, if the layout is ``tar``.

        If it is interrupted, the next call completes it.
        """
        if self._layout != "tar":
            return
        for shard in range(-(-self.count // SHARD)):
            folder = self._folder(shard)
            if not storage.exists(folder):
                continue  # packed already
            _remove_partial(self._tar(shard))
            with (
                storage.create(self._tar(shard)) as file,
                tarfile.open(fileobj=file, mode="w|") as tar,
            ):
                for i in self._members(shard):
                    content = self.read(i)
                    member = tarfile.TarInfo(self.path(i).name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            for name in storage.list_files(folder):
                storage.remove(folder / name)
            if not folder.is_remote:  # a bucket has no folders
                Path(folder).rmdir()

    def _members(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def _folder(self, shard: int) -> StoragePath:
        return self._out / f"{shard:03d}"

    def _tar(self, shard: int) -> StoragePath:
        return self._out / f"{shard:03d}.tar"


class ImageWriter:
    """Writes PNGs in threads, with a bounded queue.

    Threads suffice because the codec releases Python's lock. Use it as a context manager: on exit
    it waits until every image is written, or raises the error of one that could not be.

    Args:
        workers: number of threads.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._pending: deque[Future[None]] = deque()
        self._max_pending = 64 * workers

    def write(self, path: str, pixels: Pixels) -> None:
        """Queue one image (H, W, 3); block while the queue is full."""
        while len(self._pending) >= self._max_pending:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(save_png, path, pixels))

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()


def write_npz(
    path: str | Path, images: Iterable[Pixels], shape: tuple[int, ...], labels: np.ndarray
) -> None:
    """Write ``arr_0`` and ``labels`` as ``np.savez`` does, but image by image.

    ``np.savez`` would need all images in memory. The file appears atomically.

    Args:
        path: the ``.npz`` file, local or ``gs://``.
        images: N images of shape ``shape[1:]``, consumed one at a time.
        shape: (N, H, W, 3).
        labels: (N,).
    """
    _remove_partial(StoragePath(path))
    with (
        storage.create(str(path)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for image in images:
                array.write(image.tobytes())
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, labels)


def _remove_partial(path: StoragePath) -> None:
    """Delete what a process that was killed had written of a file; nothing else writes it now."""
    if path.is_remote:
        return  # an object that is not complete does not exist
    for name in storage.list_files(path.parent):
        if name.startswith(path.name + storage.TEMPORARY_MARK) or name == f"{path.name}.unfinished":
            storage.remove(path.parent / name)


def _numbers(names: Iterable[str]) -> Iterator[int]:
    """Yield the indices of the images among the names of files."""
    for name in names:
        stem, _, suffix = name.partition(".")
        if stem.isdecimal() and suffix == "png":
            yield int(stem)


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(name)
    assert content is not None, name  # ImageFiles packs regular files only
    return content.read()
