"""Pictures as text inside a page: few enough and small enough that it opens at once."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from rae_xla.report.runs import Picture, Run

MOST, WIDEST, SMALL = 24, 1400, 40_000
"""Pictures of a run; pixels across; bytes up to which a picture stays as it is."""


def spread(pictures: Sequence[Picture], most: int = MOST) -> list[Picture]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(pictures) <= most:
        return list(pictures)
    last = len(pictures) - 1
    return [pictures[round(i * last / (most - 1))] for i in range(most)]


def embed(run: Run) -> list[dict[str, Any]]:
    """A run's pictures for the page: ``step``, ``width``, ``height`` (of the original) and ``src``.

    One that cannot be read is remarked upon and left out.
    """
    if len(run.pictures) > MOST:
        run.remarks.append(f"{MOST} of {len(run.pictures)} pictures are shown")
    shown = []
    for picture in spread(run.pictures):
        try:
            width, height, source = _data_uri(picture)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises for a file that is none
            run.remarks.append(f"{picture.path.name} cannot be read as a picture")
            continue
        shown.append({"step": picture.step, "width": width, "height": height, "src": source})
    return shown


def _data_uri(picture: Picture) -> tuple[int, int, str]:
    content = picture.path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        image.load()
        kind = "png"
        if len(content) > SMALL:
            image = image.convert("RGB")
            image.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            image.save(out, format="webp", quality=85)
            content, kind = out.getvalue(), "webp"
    return *size, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
