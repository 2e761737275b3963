"""Files of a sample set: PNGs, loose or a thousand to a tar file, and one ``.npz`` of them all."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from rae_xla.sample.images import Pixels, save_png

SHARD = 1000
"""Images in a folder or tar file."""

_READ_BLOCK = 64  # images that are read back at a time


class ImageFiles:
    """The image files of a sample set, in one of three layouts.

    ``flat``: ``000123.png``. ``folders``: ``000/000123.png``. ``tar``: the same as ``folders``
    while images are generated; then :meth:`pack` turns each folder into a tar file, ``000.tar``.

    Args:
        out: the set's folder.
        layout: ``flat``, ``folders`` or ``tar``.
        count: number of images in the set.
    """

    def __init__(self, out: Path, layout: str, count: int) -> None:
        self._out, self._layout = out, layout
        self.count = count

    def path(self, i: int) -> Path:
        """Return the path that image i is written to."""
        name = f"{i:06d}.png"
        return self._out / name if self._layout == "flat" else self._folder(i // SHARD) / name

    def existing(self) -> set[int]:
        """Return the indices of the images that exist; each of them is complete."""
        indices: set[int] = set()
        for shard in range(-(-self.count // SHARD)):
            if self._tar(shard).exists():
                indices.update(self._members(shard))
        folders = [self._out] if self._layout == "flat" else self._out.glob("[0-9]*/")
        for folder in folders:
            indices.update(int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit())
        return {i for i in indices if i < self.count}

    def make_folders(self) -> None:
        """Create every folder that images are written to."""
        for i in range(0, self.count, SHARD):
            self.path(i).parent.mkdir(parents=True, exist_ok=True)

    def read(self, i: int) -> bytes:
        """Return the bytes of image i's PNG."""
        path = self.path(i)
        if path.exists() or self._layout != "tar":
            return path.read_bytes()
        with tarfile.open(self._tar(i // SHARD)) as tar:
            return _read_member(tar, path.name)

    def images(self, workers: int) -> Iterator[Pixels]:
        """Yield all images (H, W, 3) in order; only a block of them is in memory at a time."""
        with ThreadPoolExecutor(workers) as threads:
            for start in range(0, self.count, _READ_BLOCK):
                block = range(start, min(start + _READ_BLOCK, self.count))
                yield from threads.map(decode_png, map(self.read, block))

    def pack(self) -> None:
        """Turn folders into tar files, if the layout is ``tar``.

        If it is interrupted, the next call completes it.
        """
        if self._layout != "tar":
            return
        for shard in range(-(-self.count // SHARD)):
            if not self._folder(shard).exists():
                continue  # packed already
            tar_path = self._tar(shard)
            unfinished = tar_path.with_name(tar_path.name + ".unfinished")
            with tarfile.open(unfinished, "w") as tar:
                for i in self._members(shard):
                    content = self.read(i)
                    member = tarfile.TarInfo(self.path(i).name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            unfinished.replace(tar_path)
            shutil.rmtree(self._folder(shard))

    def _members(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self.count))

    def _folder(self, shard: int) -> Path:
        return self._out / f"{shard:03d}"

    def _tar(self, shard: int) -> Path:
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

    def write(self, path: Path, pixels: Pixels) -> None:
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
    path: Path, images: Iterable[Pixels], shape: tuple[int, ...], labels: np.ndarray
) -> None:
    """Write ``arr_0`` and ``labels`` as ``np.savez`` does, but image by image.

    ``np.savez`` would need all images in memory. The file appears atomically.

    Args:
        path: the ``.npz`` file.
        images: N images of shape ``shape[1:]``, consumed one at a time.
        shape: (N, H, W, 3).
        labels: (N,).
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for image in images:
                array.write(image.tobytes())
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, labels)
    unfinished.replace(path)


def decode_png(content: bytes) -> Pixels:
    """Return the pixels (H, W, 3) of an encoded image."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(name)
    assert content is not None, name  # ImageFiles packs regular files only
    return content.read()
