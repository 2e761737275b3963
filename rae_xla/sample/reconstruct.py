"""Reconstruction of images by the autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from rae_xla.data.transforms import center_crop, to_rgb
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend
from rae_xla.sample.images import Pixels, save_png, to_grid, to_pixels, to_unit
from rae_xla.sample.rows import collect_rows, share_rows

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

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

    Raises:
        UserError: if there is no image.
    """
    if path.is_file():
        return [path]
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"{path}: no images found (extensions: {', '.join(EXTENSIONS)})")
    return paths


def read_image(path: Path, size: int) -> Pixels:
    """Read an image and crop its centre as training does.

    Returns:
        (size, size, 3) uint8.

    Raises:
        UserError: if the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            return center_crop(to_rgb(image), size)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image ({error}): repair or remove it") from error


def reconstruct_files(
    rae: RAE, backend: Backend, images: list[Path], *, root: Path, out: Path, batch: int
) -> float:
    """Reconstruct image files. All processes compute; process 0 writes.

    Args:
        rae: the autoencoder, placed.
        backend: where it is placed.
        images: files to reconstruct.
        root: folder that contains them; their paths relative to it are kept.
        out: output folder: ``<name>.png``, and ``grid.png`` with originals above reconstructions.
        batch: images per batch.

    Returns:
        Mean PSNR over the images, in dB.
    """
    reconstruct = make_reconstruct(rae.eval(), backend)
    size = rae.image_size
    shown: list[tuple[Pixels, Pixels]] = []
    ratios: list[float] = []
    writes = backend.process_index == 0
    for start in progress_bar(range(0, len(images), batch), unit="batch", disable=not writes):
        paths = images[start : start + batch]
        originals = [read_image(path, size) for path in paths]
        rows = np.stack(originals + originals[-1:] * (batch - len(originals)))
        results = reconstruct(torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous())
        for path, original, result in zip(paths, originals, results, strict=False):
            target = (out / path.relative_to(root)).with_suffix(".png")
            if writes:
                target.parent.mkdir(parents=True, exist_ok=True)
                save_png(target, result)
            ratios.append(psnr(original, result))
            if len(shown) < _GRID_COLUMNS:
                shown.append((original, result))
    if writes:
        pairs = [original for original, _ in shown] + [result for _, result in shown]
        save_png(out / "grid.png", to_grid(np.stack(pairs), len(shown)))
    return float(np.mean(ratios))


def psnr(first: Pixels, second: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two images in dB; infinity if they are equal."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
