"""Output folder of ``rae-xla generate``: images, latents, a captioned grid, a JSON listing."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.errors import UserError
from rae_xla.sample.images import Pixels, captioned_grid, save_png

LISTING_FILE = "generated.json"
GRID_FILE = "grid.png"

_UNFINISHED = ".unfinished"
IMAGES_KEY = "pictures"  # key in the listing; its name is part of the file format
_LATENT = "latent"
_SLUG = 60  # characters of a prompt or class in the name of a file


def check_generated_folder(out: str | Path) -> None:
    """Check that a folder contains only files of an earlier ``rae-xla generate``, or none.

    Raises:
        UserError: if it contains other files.
    """
    out = StoragePath(out)
    ours = {LISTING_FILE, GRID_FILE, *_listed_files(out)}
    present = [*storage.list_files(out), *storage.list_folders(out)]
    others = sorted(n for n in present if _final_name(n) not in ours)
    if others:
        raise UserError(
            f"--out {out} contains other files ({', '.join(others[:3])}): give an empty folder, or "
            "one that an earlier `rae-xla generate` wrote"
        )


def write_generated_folder(
    out: str | Path,
    pixels: Pixels,
    labels: Sequence[int],
    class_names: Sequence[str],
    settings: dict[str, Any],
    *,
    details: Sequence[dict[str, Any]] = (),
    latents: NDArray[np.float32] | None = None,
) -> None:
    """Write images, their captioned grid and the listing; replace those of an earlier command.

    Args:
        out: a folder that passed :func:`check_generated_folder`.
        pixels: (N, H, W, 3).
        labels: N class labels.
        class_names: class names, or prompts, by label.
        settings: how the images were generated, for the listing.
        details: further entries of each image in the listing; empty: none.
        latents: (N, C, h, w), which are written next to the images; None: none.
    """
    out = StoragePath(out)
    names = [class_names[label] for label in labels]
    slugs = [re.sub(r"\W+", "-", name.lower())[:_SLUG].strip("-") for name in names]
    stems = [f"{i:03d}-{slug}".rstrip("-") for i, slug in enumerate(slugs)]
    files = [f"{stem}.png" for stem in stems]
    captions = [
        name if name == str(label) else f"{name} ({label})"
        for name, label in zip(names, labels, strict=True)
    ]
    images: list[dict[str, Any]] = [
        {"file": file, "label": label, "class": name}
        for file, label, name in zip(files, labels, names, strict=True)
    ]
    for image, more in zip(images, details, strict=bool(details)):
        image |= more
    if latents is not None:
        for image, stem in zip(images, stems, strict=True):
            image[_LATENT] = f"{stem}.npy"
    new = {*files, *(image.get(_LATENT) for image in images)}
    for old in set(_listed_files(out)) - new:
        with contextlib.suppress(FileNotFoundError):
            storage.remove(out / old)
    # The listing comes first: after an interruption, the next command can identify the files.
    listing = settings | {IMAGES_KEY: images}
    storage.write_bytes(out / LISTING_FILE, (json.dumps(listing, indent=1) + "\n").encode())
    for file, image in zip(files, pixels, strict=True):
        save_png(out / file, image)
    if latents is not None:
        for image, latent in zip(images, latents, strict=True):
            content = io.BytesIO()
            np.save(content, latent)
            storage.write_bytes(out / image[_LATENT], content.getvalue())
    save_png(out / GRID_FILE, captioned_grid(pixels, labels, captions))


def _final_name(name: str) -> str:
    """Return the name that an unfinished file would have got."""
    return name.partition(storage.TEMPORARY_MARK)[0].removesuffix(_UNFINISHED)


def _listed_files(out: StoragePath) -> list[str]:
    """Return the names of the images that an earlier command wrote to ``out``."""
    try:
        listing = json.loads(storage.read_bytes(out / LISTING_FILE))
        images = listing[IMAGES_KEY]
        latents = [image[_LATENT] for image in images if _LATENT in image]
        return [*(str(image["file"]) for image in images), *map(str, latents)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
