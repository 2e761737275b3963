"""Sample set: a folder of generated images that an interrupted command can resume."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.config.schema import DcnMesh, IciMesh, MeshConfig
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar
from rae_xla.sample.generated_folder import LISTING_FILE
from rae_xla.sample.image_files import ImageFiles, ImageWriter, write_npz
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
    out: str | Path,
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
    claim_folder(
        StoragePath(out),
        settings,
        backend,
        lambda old: bool(ImageFiles(out, old["layout"], old["count"]).existing()),
    )


def claim_folder(
    out: StoragePath,
    settings: dict[str, Any],
    backend: Backend,
    has_images: Callable[[dict[str, Any]], bool],
    *,
    ours: bool = False,
) -> None:
    """Record settings in a folder, or check those that it has; all processes call it.

    Args:
        out: the folder.
        settings: values of JSON.
        backend: of the processes.
        has_images: given the recorded settings, returns whether the folder has images of them.
        ours: whether a listing of ``rae-xla generate`` in the folder is of the same command.

    Raises:
        UserError: the folder has images of other settings, or cannot be written.
    """
    problem = _claim(out, settings, has_images, ours) if backend.process_index == 0 else ""
    problem = backend.all_gather_text(problem)[0]
    if problem:
        raise UserError(problem)


def _claim(
    out: StoragePath,
    settings: dict[str, Any],
    has_images: Callable[[dict[str, Any]], bool],
    ours: bool,
) -> str:
    """Write the settings unless the folder contains another set.

    Returns:
        An error message; empty on success.
    """
    path = out / SETTINGS_FILE
    if storage.exists(out / LISTING_FILE) and not ours:
        return f"{out} contains images of `rae-xla generate`: give another --out"
    if storage.exists(path):
        try:
            recorded = _OLD_SETTINGS | json.loads(storage.read_bytes(path))
        except (OSError, ValueError, TypeError) as error:
            return f"{path} cannot be read ({error}): give another --out, or remove the folder"
        changed = [name for name in settings if recorded.get(name) != settings[name]]
        if not changed:
            return ""
        if has_images(recorded):
            return (
                f"{out} contains a sample set with other settings ({', '.join(changed)}): give "
                "another --out, or remove the folder"
            )
    elif has_images(settings) or storage.exists(out / SET_FILE):
        return (
            f"{out} contains images with the names of a sample set, but no {SETTINGS_FILE}, so "
            "they may be of another one: give another --out"
        )
    try:
        storage.make_folder(out)
        storage.write_bytes(path, (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as error:
        return f"--out: {out} cannot be written: {error.strerror or error}"
    return ""


def write_set(
    sampler: ImageSampler,
    labels: Tensor,
    *,
    seed: int,
    batch: int,
    out: str | Path,
    keep_latents: bool = False,
    layout: str = "flat",
    workers: int = 4,
) -> StoragePath:
    """Generate the images that ``out`` lacks, and write the ``.npz`` and grid of all of them.

    Every process generates and writes its share; process 0 writes the ``.npz`` and the grid.

    Args:
        sampler: generates the images.
        labels: (N,) int64; image i shows class ``labels[i]``.
        seed: seed of the set.
        batch: images generated at a time; it does not change them.
        out: output folder, local or ``gs://``, shared by all processes: PNGs, ``grid.png`` and
            ``samples.npz`` (``arr_0`` uint8 (N, H, W, 3) as the ADM evaluation suite reads it, and
            ``labels``).
        keep_latents: also write ``latents.npy``, float32 (N, C, h, w), which needs a local folder:
            row i is the normalised latent that image i was decoded from, as ``RAE.decode`` takes
            it.
        layout: layout of the PNGs, see :class:`ImageFiles`.
        workers: threads per process that write PNGs.

    Returns:
        The path of the ``.npz``.
    """
    backend = sampler.backend
    first = backend.process_index == 0
    out = StoragePath(out)
    files = ImageFiles(out, layout, len(labels))
    shape = (len(labels), *sampler.latent_size)
    message = ""
    if first:
        if keep_latents:
            create_latents(Path(out / LATENTS_FILE), shape)
        files.make_folders()
        missing = _missing_images(files, out, shape if keep_latents else None)
        if missing:
            with contextlib.suppress(FileNotFoundError):
                storage.remove(out / SET_FILE)
        message = json.dumps(missing)
    missing = json.loads(backend.all_gather_text(message)[0])
    latents = open_latents(Path(out / LATENTS_FILE), "r+") if keep_latents else None

    def start(indices: Tensor, requested: Tensor) -> Callable[[], GeneratedBatch]:
        return sampler.dispatch(
            seed, indices, labels[indices.long()], requested, keep_latents=keep_latents
        )

    size = sampler.rows_per_device(min(batch, len(labels)))
    generate_missing(start, backend, missing, files, latents, size=size, workers=workers)
    backend.all_gather_text("written")  # a barrier: process 0 reads what the others wrote
    path = out / SET_FILE
    if first and not storage.exists(path):
        sample = files.pixels(0)
        write_npz(path, files.images(workers), (len(labels), *sample.shape), labels.numpy())
        save_png(out / "grid.png", class_grid(files, labels))
    if first:
        files.pack()
    return path


class NumberedFiles(Protocol):
    """The image files of a set, by the number of the image."""

    count: int

    def path(self, i: int) -> StoragePath:
        """Return the path that image i is written to."""
        ...


def generate_missing(
    start: Callable[[Tensor, Tensor], Callable[[], GeneratedBatch]],
    backend: Backend,
    missing: list[int],
    files: NumberedFiles,
    latents: np.memmap[Any, Any] | None,
    *,
    size: int,
    workers: int,
) -> None:
    """Generate missing images round by round; all processes take part in each round.

    Args:
        start: starts the images with the given indices (B,), of which those in a mask (B,) are
            requested, on the devices, and returns what waits for them.
        backend: of the processes.
        missing: indices of the images to generate.
        files: where they are written.
        latents: where their latents are written; None: nowhere.
        size: images that a device generates together.
        workers: threads per process that write PNGs.
    """
    # An image is always generated in the same chunk, at the same row, whatever else is missing.
    chunks = sorted({i // size for i in missing})
    parts = backend.mesh.batch_shards
    rounds = [chunks[k : k + parts] for k in range(0, len(chunks), parts)]
    wanted = torch.zeros(files.count, dtype=torch.bool)
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

    done = files.count - len(missing)
    quiet = backend.process_index != 0
    with (
        ImageWriter(workers) as writer,
        progress_bar(total=files.count, initial=done, unit="image", disable=quiet) as bar,
    ):
        for round_chunks in rounds:
            indices, requested = _round_indices(round_chunks, size, wanted, parts)
            pending.append((start(indices, requested), int(requested.sum())))
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
    rows = [[files.pixels(int(i)) for i in m] for m in members]
    blank = np.full_like(rows[0][0], 255)
    padded = [[*row, *[blank] * (columns - len(row))] for row in rows]
    images = np.stack(list(itertools.chain.from_iterable(padded)))
    return to_grid(images, columns, captions=[str(c) for c in classes])


def _missing_images(
    files: ImageFiles, out: StoragePath, latents_shape: tuple[int, ...] | None
) -> list[int]:
    """Return the indices of the images to generate.

    An image's latents are written before its PNG, but the file of latents may have been lost since:
    an image whose row of latents is zero is generated again. One channel is enough to see that.
    """
    existing = files.existing()
    if latents_shape is not None:
        latents = open_latents(Path(out / LATENTS_FILE), "r")
        existing = {i for i in existing if latents[i, 0].any()}
    return [i for i in range(files.count) if i not in existing]


def create_latents(path: Path, shape: tuple[int, ...]) -> None:
    """Create a file of zero latents, unless a complete file with this shape exists."""
    try:
        # Read-only: opened for writing, a truncated file would silently be extended with zeros.
        latents = open_latents(path, "r")
        if latents.shape == shape and latents.dtype == np.float32:
            return
    except (OSError, ValueError):
        pass  # missing or truncated: every image is generated again
    unfinished = path.with_name(path.name + ".unfinished")
    np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape).flush()
    unfinished.replace(path)


def open_latents(path: Path, mode: Any) -> np.memmap[Any, Any]:
    """Open a file of latents as a memory-mapped array."""
    return np.lib.format.open_memmap(path, mode=mode)
