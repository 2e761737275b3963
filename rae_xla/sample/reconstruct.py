"""Images through the autoencoder and back."""

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
from rae_xla.runtime import Runtime
from rae_xla.sample.pictures import Pixels, save_png, to_grid, to_pixels, to_unit
from rae_xla.sample.rows import collect_rows, share_rows

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def with_decoder(rae: RAE, decoder: nn.Module) -> RAE:
    """The same RAE with another decoder, in eval mode; the one given stays as it is."""
    view = copy.copy(rae)
    view._modules = {**rae._modules, "decoder": decoder}
    return view.eval()


def make_reconstruct(rae: RAE, runtime: Runtime) -> Callable[[Tensor], Pixels]:
    """A function from host images (B, 3, H, W) uint8 to reconstructions (B, H, W, 3) uint8."""

    @runtime.compile
    def through(images: Tensor) -> Tensor:
        with torch.no_grad(), runtime.autocast():
            return to_pixels(rae(to_unit(images)), rounding=True)

    def reconstruct(images: Tensor) -> Pixels:
        batch = share_rows(runtime, {"images": images})
        return collect_rows(runtime, batch, {"made": through(batch["images"])})["made"].numpy()

    return reconstruct


def find_images(path: Path) -> list[Path]:
    """One image, or every image below a folder, by name.

    Raises:
        UserError: when there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not found:
        raise UserError(f"{path}: no image here (looked for {', '.join(EXTENSIONS)})")
    return found


def read_image(path: Path, size: int) -> Pixels:
    """An image as (size, size, 3) uint8, centre-cropped as in training.

    Raises:
        UserError: when the file is no readable image.
    """
    try:
        with Image.open(path) as image:
            return center_crop(to_rgb(image), size)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error


def reconstruct_files(
    rae: RAE, runtime: Runtime, images: list[Path], *, root: Path, out: Path, batch: int
) -> float:
    """Reconstruct files into ``out``, under their own names, and the first of them as a grid. All
    processes reconstruct, process 0 writes.

    Args:
        rae: placed.
        runtime: where it is.
        images: what to reconstruct.
        root: their names below it are kept.
        out: gets ``<name>.png`` and ``grid.png``: originals above, reconstructions below.
        batch: images at a time.

    Returns:
        The mean over the images of the peak signal-to-noise ratio, in dB.
    """
    reconstruct = make_reconstruct(rae.eval(), runtime)
    size = rae.image_size
    shown: list[tuple[Pixels, Pixels]] = []
    ratios: list[float] = []
    writes = runtime.process_index == 0
    for start in progress_bar(range(0, len(images), batch), unit="batch", disable=not writes):
        chosen = images[start : start + batch]
        read = [read_image(path, size) for path in chosen]
        rows = np.stack(read + read[-1:] * (batch - len(read)))
        made = reconstruct(torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous())
        for path, original, result in zip(chosen, read, made, strict=False):
            target = (out / path.relative_to(root)).with_suffix(".png")
            if writes:
                target.parent.mkdir(parents=True, exist_ok=True)
                save_png(target, result)
            ratios.append(psnr(original, result))
            if len(shown) < 10:
                shown.append((original, result))
    columns = len(shown)
    pairs = [s[0] for s in shown] + [s[1] for s in shown]
    if writes:
        save_png(out / "grid.png", to_grid(np.stack(pairs), columns))
    return float(np.mean(ratios))


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, in dB."""
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
