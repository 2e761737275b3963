"""Sample set: a folder of generated images that an interrupted command can resume."""

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

from rae_xla.config.schema import DcnMesh, IciMesh, MeshConfig
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar
from rae_xla.sample.generated_folder import LISTING_FILE
from rae_xla.sample.image_files import ImageFiles, ImageWriter, decode_png, write_npz
from rae_xla.sample.images import Pixels, save_png, to_grid
from rae_xla.sample.rows import pad_rows
from rae_xla.sample.sampler import GeneratedBatch, ImageSampler

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend

GRID_ROWS, GRID_COLUMNS = 10, 10

SETTINGS_FILE = "settings.json"
LATENTS_FILE = "latents.npy"
SET_FILE = "samples.npz"

# Sets that were written before these options existed lack them in their settings.
_OLD_SETTINGS = {"keep_latents": False, "layout": "flat"}


def replicated_mesh(mesh: MeshConfig) -> MeshConfig:
    """Return the mesh for sampling: pure data parallelism, so that no device waits for another."""
    return replace(mesh, ici=IciMesh(data=-1, fsdp=1, tensor=1), dcn=DcnMesh())


def claim_set(
    out: Path,
    config: RunConfig,
    backend: Backend,
    *,
    labels: str,
    seed: int,
    count: int,
    keep_latents: bool = False,
    layout: str = "flat",
) -> None:
    """Record the settings of a sample set in its folder, or check those that it has.

    Images of two sets must not mix, nor may a set have latents of only some of its images. Process
    0 reads and writes; all processes must call this.

    Raises:
        UserError: if the folder contains images of another set, or cannot be written.
    """
    sections = ("stage_1", "stage_2", "sampler", "guidance", "transport", "misc")
    tree = config.to_dict()
    settings = {name: tree[name] for name in sections} | {"labels": labels, "seed": seed}
    settings |= {"count": count, "precision": config.runtime.precision}
    settings |= {"keep_latents": keep_latents, "layout": layout}
    problem = _claim(out, settings) if backend.process_index == 0 else ""
    problem = backend.all_gather_text(problem)[0]
    if problem:
        raise UserError(problem)


def _claim(out: Path, settings: dict[str, Any]) -> str:
    """Write the settings unless the folder contains another set.

    Returns:
        An error message; empty on success.
    """
    path = out / SETTINGS_FILE
    if (out / LISTING_FILE).exists():
        return f"{out} contains images of `rae-xla generate`: give another --out"
    if path.exists():
        recorded = _OLD_SETTINGS | json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if recorded.get(name) != settings[name]]
        if not changed:
            return ""
        if ImageFiles(out, recorded["layout"], recorded["count"]).existing():
            return (
                f"{out} contains a sample set with other settings ({', '.join(changed)}): give "
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
    """Generate the images that ``out`` lacks, and write the ``.npz`` and grid of all of them.

    Every process generates and writes its share; process 0 writes the ``.npz`` and the grid.

    Args:
        sampler: generates the images.
        labels: (N,) int64; image i shows class ``labels[i]``.
        seed: seed of the set.
        batch: images generated at a time; it does not change them.
        out: output folder, shared by all processes: PNGs, ``grid.png`` and ``samples.npz``
            (``arr_0`` uint8 (N, H, W, 3) as the ADM evaluation suite reads it, and ``labels``).
        keep_latents: also write ``latents.npy``, float32 (N, C, h, w): row i is the normalised
            latent that image i was decoded from, as ``RAE.decode`` takes it.
        layout: layout of the PNGs, see :class:`ImageFiles`.
        workers: threads per process that write PNGs.

    Returns:
        The path of the ``.npz``.
    """
    backend = sampler.backend
    first = backend.process_index == 0
    files = ImageFiles(out, layout, len(labels))
    shape = (len(labels), *sampler.latent_size)
    message = ""
    if first:
        if keep_latents:
            _create_latents(out / LATENTS_FILE, shape)
        files.make_folders()
        missing = _missing_images(files, out, shape if keep_latents else None)
        if missing:
            (out / SET_FILE).unlink(missing_ok=True)
        message = json.dumps(missing)
    missing = json.loads(backend.all_gather_text(message)[0])
    latents = _open_latents(out / LATENTS_FILE, "r+") if keep_latents else None
    _generate(sampler, labels, missing, files, latents, seed=seed, batch=batch, workers=workers)
    backend.all_gather_text("written")  # a barrier: process 0 reads what the others wrote
    path = out / SET_FILE
    if first and not path.exists():
        sample = decode_png(files.read(0))
        write_npz(path, files.images(workers), (len(labels), *sample.shape), labels.numpy())
        save_png(out / "grid.png", class_grid(files, labels))
    if first:
        files.pack()
    return path


def _generate(
    sampler: ImageSampler,
    labels: Tensor,
    missing: list[int],
    files: ImageFiles,
    latents: np.memmap[Any, Any] | None,
    *,
    seed: int,
    batch: int,
    workers: int,
) -> None:
    """Generate missing images round by round; all processes take part in each round."""
    backend = sampler.backend
    # An image is always generated in the same chunk, at the same row, whatever else is missing.
    size = sampler.rows_per_device(min(batch, len(labels)))
    chunks = sorted({i // size for i in missing})
    parts = backend.mesh.batch_shards
    rounds = [chunks[k : k + parts] for k in range(0, len(chunks), parts)]
    wanted = torch.zeros(len(labels), dtype=torch.bool)
    wanted[missing] = True
    # A CPU has computed a batch when dispatch returns. Other devices work on the next batch while
    # the previous one is written.
    ahead = 0 if backend.device.type == "cpu" else 1
    pending: list[tuple[Callable[[], GeneratedBatch], int]] = []

    def write(wait: Callable[[], GeneratedBatch], count: int) -> None:
        generated = wait()
        if latents is not None and generated.latents is not None:
            latents[generated.indices] = generated.latents
            latents.flush()
        for i, pixels in zip(generated.indices.tolist(), generated.pixels, strict=True):
            writer.write(files.path(i), pixels)
        bar.update(count)

    done = len(labels) - len(missing)
    quiet = backend.process_index != 0
    with (
        ImageWriter(workers) as writer,
        progress_bar(total=len(labels), initial=done, unit="image", disable=quiet) as bar,
    ):
        for round_chunks in rounds:
            indices, requested = _round_indices(round_chunks, size, wanted, parts)
            wait = sampler.dispatch(
                seed,
                indices,
                labels[indices.long()],
                requested,
                keep_latents=latents is not None,
            )
            pending.append((wait, int(requested.sum())))
            if len(pending) > ahead:
                write(*pending.pop(0))
        for batch_and_count in pending:
            write(*batch_and_count)


def _round_indices(
    chunks: list[int], size: int, wanted: Tensor, parts: int
) -> tuple[Tensor, Tensor]:
    """Return the images of one round.

    Args:
        chunks: numbers of the round's chunks, at most ``parts``.
        size: images in a chunk.
        wanted: (N,) bool; the images of the set that are missing.
        parts: number of batch shards.

    Returns:
        Image indices (parts * size,) int32, and a bool mask that is False for padding and for
        images that are not missing.
    """
    indices = (torch.tensor(chunks)[:, None] * size + torch.arange(size)).flatten()
    requested = indices < len(wanted)
    indices = indices.clamp(max=len(wanted) - 1)
    requested &= wanted[indices]
    padded = torch.zeros(parts * size, dtype=torch.bool)
    padded[: len(indices)] = requested
    return pad_rows(indices, parts * size).int(), padded


def class_grid(files: ImageFiles, labels: Tensor) -> Pixels:
    """Return a grid (H', W', 3) with a captioned row of images for each of the first classes."""
    classes = labels.unique().tolist()[:GRID_ROWS]
    members = [np.flatnonzero(labels.numpy() == c)[:GRID_COLUMNS] for c in classes]
    columns = max(len(m) for m in members)
    rows = [[decode_png(files.read(int(i))) for i in m] for m in members]
    blank = np.full_like(rows[0][0], 255)
    padded = [[*row, *[blank] * (columns - len(row))] for row in rows]
    images = np.stack(list(itertools.chain.from_iterable(padded)))
    return to_grid(images, columns, captions=[str(c) for c in classes])


def _missing_images(
    files: ImageFiles, out: Path, latents_shape: tuple[int, ...] | None
) -> list[int]:
    """Return the indices of the images to generate.

    An image's latents are written before its PNG, but the file of latents may have been lost since:
    an image whose row of latents is zero is generated again. One channel is enough to see that.
    """
    existing = files.existing()
    if latents_shape is not None:
        latents = _open_latents(out / LATENTS_FILE, "r")
        existing = {i for i in existing if latents[i, 0].any()}
    return [i for i in range(files.count) if i not in existing]


def _create_latents(path: Path, shape: tuple[int, ...]) -> None:
    """Create a file of zero latents, unless a complete file with this shape exists."""
    try:
        # Read-only: opened for writing, a truncated file would silently be extended with zeros.
        latents = _open_latents(path, "r")
        if latents.shape == shape and latents.dtype == np.float32:
            return
    except (OSError, ValueError):
        pass  # missing or truncated: every image is generated again
    unfinished = path.with_name(path.name + ".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape).flush()
    unfinished.replace(path)


def _open_latents(path: Path, mode: Any) -> np.memmap[Any, Any]:
    return np.lib.format.open_memmap(path, mode=mode)
