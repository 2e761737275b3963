"""Output folder of ``rae-xla generate``: PNGs, a captioned grid, and a JSON listing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.sample.images import Pixels, captioned_grid, save_png

LISTING_FILE = "generated.json"
GRID_FILE = "grid.png"

_UNFINISHED = ".unfinished"
_IMAGES = "pictures"  # key in the listing; its name is part of the file format


def check_generated_folder(out: Path) -> None:
    """Check that a folder contains only files of an earlier ``rae-xla generate``, or none.

    Raises:
        UserError: if it contains other files.
    """
    ours = {LISTING_FILE, GRID_FILE, *_listed_files(out)}
    others = sorted(p.name for p in out.iterdir() if p.name.removesuffix(_UNFINISHED) not in ours)
    if others:
        raise UserError(
            f"--out {out} contains other files ({', '.join(others[:3])}): give an empty folder, or "
            "one that an earlier `rae-xla generate` wrote"
        )


def write_generated_folder(
    out: Path,
    pixels: Pixels,
    labels: Sequence[int],
    class_names: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Write images, their captioned grid and the listing; replace those of an earlier command.

    Args:
        out: a folder that passed :func:`check_generated_folder`.
        pixels: (N, H, W, 3).
        labels: N class labels.
        class_names: class names by label.
        settings: how the images were generated, for the listing.
    """
    names = [class_names[label] for label in labels]
    slugs = [re.sub(r"\W+", "-", name.lower()).strip("-") for name in names]
    files = [f"{i:03d}-{slug}.png" for i, slug in enumerate(slugs)]
    captions = [
        name if name == str(label) else f"{name} ({label})"
        for name, label in zip(names, labels, strict=True)
    ]
    images = [
        {"file": file, "label": label, "class": name}
        for file, label, name in zip(files, labels, names, strict=True)
    ]
    for old in set(_listed_files(out)) - set(files):
        (out / old).unlink(missing_ok=True)
    # The listing comes first: after an interruption, the next command can identify the files.
    unfinished = out / f"{LISTING_FILE}{_UNFINISHED}"
    listing = settings | {_IMAGES: images}
    unfinished.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(out / LISTING_FILE)
    for file, image in zip(files, pixels, strict=True):
        save_png(out / file, image)
    save_png(out / GRID_FILE, captioned_grid(pixels, labels, captions))


def _listed_files(out: Path) -> list[str]:
    """Return the names of the images that an earlier command wrote to ``out``."""
    try:
        listing = json.loads((out / LISTING_FILE).read_text(encoding="utf-8"))
        return [str(image["file"]) for image in listing[_IMAGES]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
