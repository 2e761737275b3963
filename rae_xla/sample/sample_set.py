"""A set of pictures in a folder: drawn, written, taken up again where it stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.config.sections import DcnMesh, IciMesh, MeshConfig
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar
from rae_xla.sample import GENERATED_FILE
from rae_xla.sample.generate import Drawn, ImageSampler
from rae_xla.sample.picture_files import PictureFiles, PictureWriter, decode_png, write_npz
from rae_xla.sample.pictures import Pixels, pad_rows, save_png, to_grid

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Runtime

GRID_ROWS, GRID_COLUMNS = 10, 10

SETTINGS_FILE = "settings.json"
LATENTS_FILE = "latents.npy"
SET_FILE = "samples.npz"
# what sets say that were made before these could be chosen
_OLD_SETTINGS = {"keep_latents": False, "layout": "flat"}


def whole_on_every_device(mesh: MeshConfig) -> MeshConfig:
    """The mesh to sample on: every device has all weights and pictures of its own, so that none
    waits for another.
    """
    return replace(mesh, ici=IciMesh(data=-1, fsdp=1, tensor=1), dcn=DcnMesh())


def claim_set(
    out: Path,
    config: RunConfig,
    runtime: Runtime,
    *,
    labels: str,
    seed: int,
    count: int,
    keep_latents: bool = False,
    layout: str = "flat",
) -> None:
    """Make the folder this set's, or check that it is: pictures of two sets must not mix.

    Nor must a set have the latents of some of its pictures: whether they are kept is a setting too.
    Process 0 does it, all must call it.

    Raises:
        UserError: when the folder holds another set.
    """
    sections = ("stage_1", "stage_2", "sampler", "guidance", "transport", "misc")
    tree = config.to_dict()
    settings = {name: tree[name] for name in sections} | {"labels": labels, "seed": seed}
    settings |= {"count": count, "precision": config.runtime.precision}
    settings |= {"keep_latents": keep_latents, "layout": layout}
    problem = _claim(out, settings) if runtime.process_index == 0 else ""
    problem = runtime.exchange(problem)[0]
    if problem:
        raise UserError(problem)


def _claim(out: Path, settings: dict[str, Any]) -> str:
    """Write the settings unless others hold the folder; what is wrong, or nothing."""
    path = out / SETTINGS_FILE
    if (out / GENERATED_FILE).exists():
        return f"{out} has pictures of `rae-xla generate` in it: give another --out"
    if path.exists():
        theirs = _OLD_SETTINGS | json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if theirs.get(name) != settings[name]]
        if not changed:
            return ""
        if PictureFiles(out, theirs["layout"], theirs["count"]).found():
            return (
                f"{out} holds a sample set with other settings ({', '.join(changed)}): give "
                "another --out, or remove the folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        return f"--out: {out} cannot be written: {error.strerror or error}"
    return ""


def write_set(
    sampler: ImageSampler,
    labels: Tensor,
    *,
    seed: int,
    batch: int,
    out: Path,
    keep_latents: bool = False,
    layout: str = "flat",
    workers: int = 4,
) -> Path:
    """Draw the picture of every label that is not in ``out`` yet, then gather them all. Every
    process draws its share and writes it; process 0 gathers.

    Args:
        sampler: draws the pictures.
        labels: (N,) int64; picture i shows class ``labels[i]``.
        seed: of the set.
        batch: pictures drawn at a time; it does not change them.
        out: the folder, which all processes share; gets the PNGs, ``grid.png`` and ``samples.npz``
            (``arr_0`` uint8 (N, H, W, 3) as the ADM evaluation suite reads it, and ``labels``).
        keep_latents: also write ``latents.npy``, float32 (N, C, h, w): row i is what picture i was
            decoded from, normalised, as ``RAE.decode`` takes it.
        layout: of the PNGs, see ``PictureFiles``.
        workers: threads of every process that write them.

    Returns:
        The path of the ``.npz``.
    """
    runtime = sampler.runtime
    first = runtime.process_index == 0
    files = PictureFiles(out, layout, len(labels))
    shape = (len(labels), *sampler.latent_size)
    said = ""
    if first:
        if keep_latents:
            _make_latents(out / LATENTS_FILE, shape)
        files.make_folders()
        missing = _missing(files, out, shape if keep_latents else None)
        if missing:
            (out / SET_FILE).unlink(missing_ok=True)
        said = json.dumps(missing)
    missing = json.loads(runtime.exchange(said)[0])
    latents = _open_latents(out / LATENTS_FILE, "r+") if keep_latents else None
    _draw(sampler, labels, missing, files, latents, seed=seed, batch=batch, workers=workers)
    runtime.exchange("written")
    path = out / SET_FILE
    if first and not path.exists():
        sample = decode_png(files.read(0))
        write_npz(path, files.pictures(workers), (len(labels), *sample.shape), labels.numpy())
        save_png(out / "grid.png", class_grid(files, labels))
    if first:
        files.pack()
    return path


def _draw(
    sampler: ImageSampler,
    labels: Tensor,
    missing: list[int],
    files: PictureFiles,
    latents: np.memmap[Any, Any] | None,
    *,
    seed: int,
    batch: int,
    workers: int,
) -> None:
    """Draw what is missing, round by round; all processes take part in each round."""
    runtime = sampler.runtime
    # Pictures are drawn in the same company, at the same places, whatever else is missing.
    size = sampler.rows_per_device(min(batch, len(labels)))
    chunks = sorted({i // size for i in missing})
    parts = runtime.mesh.batch_parts
    rounds = [chunks[k : k + parts] for k in range(0, len(chunks), parts)]
    wanted = torch.zeros(len(labels), dtype=torch.bool)
    wanted[missing] = True
    # A CPU has done its work when it has been asked. Others are a batch ahead of the writing.
    ahead = 0 if runtime.device.type == "cpu" else 1
    begun: list[tuple[Callable[[], Drawn], int]] = []

    def write(wait: Callable[[], Drawn], count: int) -> None:
        drawn = wait()
        if latents is not None and drawn.latents is not None:
            latents[drawn.rows] = drawn.latents
            latents.flush()
        for i, pixels in zip(drawn.rows.tolist(), drawn.pixels, strict=True):
            writer.write(files.path(i), pixels)
        bar.update(count)

    done = len(labels) - len(missing)
    speaks = runtime.process_index == 0
    with (
        PictureWriter(workers) as writer,
        progress_bar(total=len(labels), initial=done, unit="image", disable=not speaks) as bar,
    ):
        for some in rounds:
            rows, fresh = _rows_of(some, size, wanted, parts)
            wait = sampler.begin(
                seed, rows, labels[rows.long()], fresh, keep_latents=latents is not None
            )
            begun.append((wait, int(fresh.sum())))
            if len(begun) > ahead:
                write(*begun.pop(0))
        for drawn in begun:
            write(*drawn)


def _rows_of(chunks: list[int], size: int, wanted: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The pictures' numbers (parts * size,) int32 of a round's chunks, and which are wanted. What
    fills up is not.
    """
    members = torch.arange(size)
    rows = (torch.tensor(chunks)[:, None] * size + members).flatten()
    fresh = rows < len(wanted)
    rows = rows.clamp(max=len(wanted) - 1)
    fresh &= wanted[rows]
    filled = torch.zeros(parts * size, dtype=torch.bool)
    filled[: len(rows)] = fresh
    return pad_rows(rows, parts * size).int(), filled


def class_grid(files: PictureFiles, labels: Tensor) -> Pixels:
    """One captioned row for each of the first classes there are, its first pictures in it."""
    classes = labels.unique().tolist()[:GRID_ROWS]
    members = [np.flatnonzero(labels.numpy() == c)[:GRID_COLUMNS] for c in classes]
    columns = max(len(m) for m in members)
    rows = [[decode_png(files.read(int(i))) for i in m] for m in members]
    blank = np.full_like(rows[0][0], 255)
    filled = [[*row, *[blank] * (columns - len(row))] for row in rows]
    pictures = np.stack(list(itertools.chain.from_iterable(filled)))
    return to_grid(pictures, columns, captions=[str(c) for c in classes])


def _missing(files: PictureFiles, out: Path, latents_shape: tuple[int, ...] | None) -> list[int]:
    """Pictures that have to be drawn. A picture's row of latents is on disk before it is; the row
    is looked at too (one channel tells) because the file may have been lost since.
    """
    there = files.found()
    if latents_shape is not None:
        rows = _open_latents(out / LATENTS_FILE, "r")
        there = {i for i in there if rows[i, 0].any()}
    return [i for i in range(files.count) if i not in there]


def _make_latents(path: Path, shape: tuple[int, ...]) -> None:
    """See that there is a whole file of latents, to be written row by row; a new one is full of
    zeros.
    """
    try:
        # read-only: opened for writing, a file that was cut short would grow zeros unsaid
        found = _open_latents(path, "r")
        if found.shape == shape and found.dtype == np.float32:
            return
    except (OSError, ValueError):
        pass  # there is none, or not a whole one: every row is drawn again
    unfinished = path.with_name(path.name + ".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape).flush()
    unfinished.replace(path)


def _open_latents(path: Path, mode: Any) -> np.memmap[Any, Any]:
    return np.lib.format.open_memmap(path, mode=mode)
