"""A set of pictures in a folder: PNGs, a grid to look at, and the ``.npz`` FID tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rae_xla.errors import UserError
from rae_xla.sample.generate import ImageSampler
from rae_xla.sample.pictures import Pixels, save_png, to_grid

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

GRID_ROWS, GRID_COLUMNS = 10, 10


SETTINGS_FILE = "settings.json"


def claim_set(out: Path, config: RunConfig, *, labels: str, seed: int, count: int) -> None:
    """Make the folder this set's, or check that it is: pictures of two sets must not mix.

    Raises:
        UserError: when the folder holds another set.
    """
    sections = ("stage_1", "stage_2", "sampler", "guidance", "transport", "misc")
    tree = config.to_dict()
    settings = {name: tree[name] for name in sections} | {"labels": labels, "seed": seed}
    settings |= {"count": count, "precision": config.runtime.precision}
    path = out / SETTINGS_FILE
    if path.exists() and _path(out, 0).exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if theirs.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"{out} holds a sample set with other settings ({', '.join(changed)}): give "
                "another --out, or remove the folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def write_set(sampler: ImageSampler, labels: Tensor, *, seed: int, batch: int, out: Path) -> Path:
    """Draw the picture of every label that is not in ``out`` yet, then gather them all.

    Args:
        sampler: draws the pictures.
        labels: (N,) int64; picture i shows class ``labels[i]``.
        seed: of the set.
        batch: pictures drawn at a time; it does not change them.
        out: the folder; gets ``000000.png`` ..., ``grid.png`` and ``samples.npz`` (``arr_0``
            uint8 (N, H, W, 3) as the ADM evaluation suite reads it, and ``labels``).

    Returns:
        The path of the ``.npz``.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(labels)) if not _path(out, i).exists()]
    with tqdm(total=len(labels), initial=len(labels) - len(missing), unit="image") as bar:
        for start in range(0, len(missing), batch):
            chosen = missing[start : start + batch]
            # every batch has the same shape; the last is filled up with its own last picture
            rows = torch.tensor(chosen + chosen[-1:] * (batch - len(chosen)), dtype=torch.int32)
            for i, picture in zip(chosen, sampler(seed, rows, labels[rows.long()]), strict=False):
                save_png(_path(out, i), picture)
            bar.update(len(chosen))
    pixels = np.stack([_read(_path(out, i)) for i in range(len(labels))])
    save_png(out / "grid.png", class_grid(pixels, labels))
    path = out / "samples.npz"
    np.savez(path, arr_0=pixels, labels=labels.numpy())
    return path


def class_grid(pixels: Pixels, labels: Tensor) -> Pixels:
    """One captioned row for each of the first classes there are, its first pictures in it."""
    classes = labels.unique().tolist()[:GRID_ROWS]
    members = [np.flatnonzero(labels.numpy() == c)[:GRID_COLUMNS] for c in classes]
    columns = max(len(m) for m in members)
    blank = np.full((columns, *pixels.shape[1:]), 255, np.uint8)
    rows = [np.concatenate([pixels[m], blank[len(m) :]]) for m in members]
    return to_grid(np.concatenate(rows), columns, captions=[str(c) for c in classes])


def _path(out: Path, i: int) -> Path:
    return out / f"{i:06d}.png"


def _read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
