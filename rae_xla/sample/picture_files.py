"""The files of a sample set: PNGs, alone or a thousand to a tar, and the ``.npz`` of them all."""

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

from rae_xla.sample.pictures import Pixels, save_png

LAYOUTS = ("flat", "folders", "tar")
SHARD = 1000
"""Pictures in a folder or tar."""

_BLOCK = 64  # pictures read back at a time


class PictureFiles:
    """Where the pictures of a set are.

    ``flat``: ``000123.png``. ``folders``: ``000/000123.png``. ``tar``: like ``folders`` while the
    set is drawn, then :meth:`pack` makes ``000.tar`` of each folder.

    Args:
        out: the set's folder.
        layout: one of ``LAYOUTS``.
        count: of the set's pictures.
    """

    def __init__(self, out: Path, layout: str, count: int) -> None:
        self._out, self._layout = out, layout
        self.count = count

    def path(self, i: int) -> Path:
        """Where picture i is written."""
        name = f"{i:06d}.png"
        return self._out / name if self._layout == "flat" else self._folder(i // SHARD) / name

    def found(self) -> set[int]:
        """The numbers of the pictures that are there, each of which is whole."""
        found: set[int] = set()
        for shard in range(-(-self.count // SHARD)):
            if self._tar(shard).exists():
                found.update(self._members(shard))
        folders = [self._out] if self._layout == "flat" else self._out.glob("[0-9]*/")
        for folder in folders:
            found.update(int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit())
        return {i for i in found if i < self.count}

    def make_folders(self) -> None:
        """Make every folder that pictures are written to."""
        for i in range(0, self.count, SHARD):
            self.path(i).parent.mkdir(parents=True, exist_ok=True)

    def read(self, i: int) -> bytes:
        """The bytes of a picture's PNG."""
        path = self.path(i)
        if path.exists() or self._layout != "tar":
            return path.read_bytes()
        with tarfile.open(self._tar(i // SHARD)) as tar:
            return _member(tar, path.name)

    def pictures(self, workers: int) -> Iterator[Pixels]:
        """All pictures, (H, W, 3) each, in their order; a few at a time are in memory."""
        with ThreadPoolExecutor(workers) as threads:
            for start in range(0, self.count, _BLOCK):
                block = range(start, min(start + _BLOCK, self.count))
                yield from threads.map(decode_png, map(self.read, block))

    def pack(self) -> None:
        """With the layout ``tar``: make tar files of the folders. Killed meanwhile, it can be done
        again.
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


class PictureWriter:
    """Writes PNGs in threads (the codec runs without Python's lock), never far behind.

    A context: when it is left, all is written, or an error is raised.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._waiting: deque[Future[None]] = deque()
        self._most = 64 * workers

    def write(self, path: Path, pixels: Pixels) -> None:
        """Have one picture (H, W, 3) written; waits while too many others are."""
        while len(self._waiting) >= self._most:
            self._waiting.popleft().result()
        self._waiting.append(self._threads.submit(save_png, path, pixels))

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()


def write_npz(
    path: Path, pictures: Iterable[Pixels], shape: tuple[int, ...], labels: np.ndarray
) -> None:
    """Write ``arr_0`` and ``labels`` as ``np.savez`` does, picture by picture.

    Args:
        path: a file that is there is whole.
        pictures: of shape ``shape[1:]``, taken one after the other.
        shape: (N, H, W, 3).
        labels: (N,).
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for picture in pictures:
                array.write(picture.tobytes())
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, labels)
    unfinished.replace(path)


def decode_png(content: bytes) -> Pixels:
    """The pixels (H, W, 3) of a picture's file."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(name)
    assert content is not None, name  # a tar of ours has nothing but files
    return content.read()
