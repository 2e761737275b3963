"""A set of pictures in a folder: PNGs, a grid to look at, and the ``.npz`` FID tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
LATENTS_FILE = "latents.npy"


def claim_set(
    out: Path,
    config: RunConfig,
    *,
    labels: str,
    seed: int,
    count: int,
    keep_latents: bool = False,
) -> None:
    """Make the folder this set's, or check that it is: pictures of two sets must not mix.

    Nor must a set have the latents of some of its pictures: whether they are kept is a setting too.

    Raises:
        UserError: when the folder holds another set.
    """
    sections = ("stage_1", "stage_2", "sampler", "guidance", "transport", "misc")
    tree = config.to_dict()
    settings = {name: tree[name] for name in sections} | {"labels": labels, "seed": seed}
    settings |= {"count": count, "precision": config.runtime.precision}
    settings |= {"keep_latents": keep_latents}
    path = out / SETTINGS_FILE
    if path.exists() and _path(out, 0).exists():
        # sets made before latents could be kept say nothing of them
        theirs = {"keep_latents": False} | json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if theirs.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"{out} holds a sample set with other settings ({', '.join(changed)}): give "
                "another --out, or remove the folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def write_set(
    sampler: ImageSampler,
    labels: Tensor,
    *,
    seed: int,
    batch: int,
    out: Path,
    keep_latents: bool = False,
) -> Path:
    """Draw the picture of every label that is not in ``out`` yet, then gather them all. All
    processes draw, process 0 writes.

    Args:
        sampler: draws the pictures.
        labels: (N,) int64; picture i shows class ``labels[i]``.
        seed: of the set.
        batch: pictures drawn at a time; it does not change them.
        out: the folder; gets ``000000.png`` ..., ``grid.png`` and ``samples.npz`` (``arr_0``
            uint8 (N, H, W, 3) as the ADM evaluation suite reads it, and ``labels``).
        keep_latents: also write ``latents.npy``, float32 (N, C, h, w): row i is what picture i was
            decoded from, normalised, as ``RAE.decode`` takes it.

    Returns:
        The path of the ``.npz``.
    """
    runtime = sampler.runtime
    writes = runtime.process_index == 0
    latents = None
    missing: list[int] = []
    if writes:
        out.mkdir(parents=True, exist_ok=True)
        if keep_latents:
            latents = _open_latents(out / LATENTS_FILE, (len(labels), *sampler.latent_size))
        missing = [i for i in range(len(labels)) if not _is_there(out, i, latents)]
    missing = json.loads(runtime.exchange(json.dumps(missing))[0])
    done = len(labels) - len(missing)
    with tqdm(total=len(labels), initial=done, unit="image", disable=not writes) as bar:
        for start in range(0, len(missing), batch):
            chosen = missing[start : start + batch]
            # every batch has the same shape; the last is filled up with its own last picture
            rows = torch.tensor(chosen + chosen[-1:] * (batch - len(chosen)), dtype=torch.int32)
            if not keep_latents:
                pictures = sampler(seed, rows, labels[rows.long()])
            else:
                pictures, drawn = sampler.with_latents(seed, rows, labels[rows.long()])
            if not writes:
                continue
            if latents is not None:
                latents[chosen] = drawn[: len(chosen)]
                latents.flush()
            for i, picture in zip(chosen, pictures, strict=False):
                save_png(_path(out, i), picture)
            bar.update(len(chosen))
    path = out / "samples.npz"
    if not writes:
        return path
    pixels = np.stack([_read(_path(out, i)) for i in range(len(labels))])
    save_png(out / "grid.png", class_grid(pixels, labels))
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


def _is_there(out: Path, i: int, latents: np.memmap[Any, Any] | None) -> bool:
    """Whether picture i need not be drawn. Its row of latents is on disk before it is; the row is
    looked at too (one channel tells) because the file may have been lost since.
    """
    return _path(out, i).exists() and (latents is None or bool(latents[i, 0].any()))


def _open_latents(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """The file of latents, to be written row by row; made, full of zeros, if it is not there."""
    try:
        # read-only first: opened for writing, a file that was cut short would grow zeros unsaid
        found = np.lib.format.open_memmap(path, mode="r")
        if found.shape == shape and found.dtype == np.float32:
            return np.lib.format.open_memmap(path, mode="r+")
    except (OSError, ValueError):
        pass  # there is none, or not a whole one: every row is drawn again
    unfinished = path.with_name(path.name + ".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape).flush()
    unfinished.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")


def _path(out: Path, i: int) -> Path:
    return out / f"{i:06d}.png"


def _read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
