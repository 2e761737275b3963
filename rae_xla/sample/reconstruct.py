"""Reconstruction of images by the autoencoder."""

from __future__ import annotations

import copy
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rae_xla import storage
from rae_xla.data.image_decoding import ImageError, open_image
from rae_xla.data.image_finder import ImageNotes, LeftOut, find_files, no_images_message
from rae_xla.data.transforms import center_crop
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend
from rae_xla.sample.images import Pixels, save_png, to_grid, to_pixels, to_unit
from rae_xla.sample.rows import collect_rows, share_rows

GRID_FILE = "grid.png"

_GRID_COLUMNS = 10


def with_decoder(rae: RAE, decoder: nn.Module) -> RAE:
    """Return an RAE in eval mode that shares everything but its decoder with ``rae``."""
    view = copy.copy(rae)
    view._modules = {**rae._modules, "decoder": decoder}
    return view.eval()


def make_reconstruct(rae: RAE, backend: Backend) -> Callable[[Tensor], Pixels]:
    """Return a compiled function that reconstructs images.

    The function maps (B, 3, H, W) uint8 on the host, the same in every process, to (B, H, W, 3)
    uint8, also on the host of every process.
    """

    @backend.compile
    def reconstruct_on_devices(images: Tensor) -> Tensor:
        with torch.no_grad(), backend.autocast():
            return to_pixels(rae(to_unit(images)), rounding=True)

    def reconstruct(images: Tensor) -> Pixels:
        batch = share_rows(backend, {"images": images})
        results = {"pixels": reconstruct_on_devices(batch["images"])}
        return collect_rows(backend, batch, results)["pixels"].numpy()

    return reconstruct


def find_images(path: Path) -> list[Path]:
    """Return the image file at ``path``, or all images below the folder at ``path``, sorted.

    What is not taken is logged.

    Raises:
        UserError: if there is no image, or a folder cannot be read.
    """
    if path.is_file():
        return [path]
    left_out = LeftOut()
    paths = sorted(map(Path, find_files(path, left_out)))
    if not paths:
        raise UserError(f"{path}: no images found: {no_images_message(left_out)}")
    left_out.log(str(path))
    return paths


def output_names(images: Sequence[Path], root: Path) -> list[Path]:
    """Return the name of every reconstruction, relative to the output folder.

    It is ``<name>.png`` in the sub-folder of the image. Where several images, or an image and the
    grid, would have the same one, it is ``<name>.<extension>.png``.

    Args:
        images: files to reconstruct.
        root: folder that contains them.

    Raises:
        UserError: if two of these names are equal, too.
    """
    relative = [path.relative_to(root) for path in images]
    short = [path.with_suffix(".png") for path in relative]
    uses = Counter(map(_same_file, [*short, Path(GRID_FILE)]))
    names = [
        name if uses[_same_file(name)] == 1 else path.with_name(f"{path.name}.png")
        for path, name in zip(relative, short, strict=True)
    ]
    by_name: dict[str, Path] = {}
    for path, name in zip(relative, names, strict=True):
        other = by_name.setdefault(_same_file(name), path)
        if other != path:
            raise UserError(
                f"the reconstructions of {root / other} and {root / path} would both be {name}: "
                "rename one of the images"
            )
    return names


def _same_file(name: Path) -> str:
    """Return what is equal for names that some file systems take for the same file."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def check_outputs(images: Sequence[Path], source: str | Path, out: str | Path) -> None:
    """Check that no reconstruction can replace an image of the input.

    Args:
        images: files to reconstruct.
        source: what contains them, for the error message.
        out: the output folder.

    Raises:
        UserError: if an image is in the output folder.
    """
    inside = [path for path in images if storage.is_within(str(path), str(out))]
    if inside:
        raise UserError(
            f"--out {out} contains {len(inside)} of the images of --input {source} ({inside[0]}), "
            "which are never overwritten: give another folder"
        )


def read_image(path: Path, size: int, notes: ImageNotes | None = None) -> Pixels:
    """Read an image and crop its centre as training does.

    Args:
        path: the image.
        size: side of the crop, in pixels.
        notes: gets what is not read of the image, as in training: an EXIF rotation, more frames.

    Returns:
        (size, size, 3) uint8.

    Raises:
        UserError: if the file is not a readable image.
    """
    try:
        with open_image(path.read_bytes(), str(path), notes) as image:
            return center_crop(image, size)
    except (ImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from error


def reconstruct_files(
    rae: RAE, backend: Backend, images: list[Path], *, root: Path, out: Path, batch: int
) -> float:
    """Reconstruct image files. All processes compute; process 0 writes.

    Args:
        rae: the autoencoder, placed.
        backend: where it is placed.
        images: files to reconstruct, none of them in ``out``.
        root: folder that contains them; their paths relative to it are kept.
        out: output folder: the reconstructions (see :func:`output_names`), and ``grid.png`` with
            originals above reconstructions.
        batch: images per batch.

    Returns:
        Mean PSNR over the images, in dB.

    Raises:
        UserError: if an image is in ``out`` or cannot be read, or two reconstructions would have
            the same name.
    """
    check_outputs(images, root, out)
    targets = [out / name for name in output_names(images, root)]
    reconstruct = make_reconstruct(rae.eval(), backend)
    size = rae.image_size
    shown: list[tuple[Pixels, Pixels]] = []
    ratios: list[float] = []
    notes = ImageNotes()
    writes = backend.process_index == 0
    for start in progress_bar(range(0, len(images), batch), unit="batch", disable=not writes):
        paths = images[start : start + batch]
        originals = [read_image(path, size, notes) for path in paths]
        rows = np.stack(originals + originals[-1:] * (batch - len(originals)))
        results = reconstruct(torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous())
        for number, (original, result) in enumerate(zip(originals, results, strict=False), start):
            if writes:
                targets[number].parent.mkdir(parents=True, exist_ok=True)
                save_png(targets[number], result)
            ratios.append(psnr(original, result))
            if len(shown) < _GRID_COLUMNS:
                shown.append((original, result))
    if writes:
        notes.log(str(root))
        pairs = [original for original, _ in shown] + [result for _, result in shown]
        save_png(out / GRID_FILE, to_grid(np.stack(pairs), len(shown)))
    return float(np.mean(ratios))


def psnr(first: Pixels, second: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; infinity if they are equal."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
