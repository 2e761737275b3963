"""Sample images embedded in the page, limited in number and size so that it loads quickly."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from rae_xla import storage
from rae_xla.data.image_decoding import ImageError, open_image
from rae_xla.tools.report.runs import LoggedImage, Run

MAX_IMAGES = 24
"""Images per run."""
MAX_WIDTH = 1400
"""Pixels of an embedded image."""
MAX_UNCOMPRESSED = 40_000
"""Bytes of a PNG above which it is embedded as a smaller WebP."""


def select_evenly(images: Sequence[LoggedImage], limit: int = MAX_IMAGES) -> list[LoggedImage]:
    """Select at most ``limit`` images, evenly spaced, with the first and the last."""
    if len(images) <= limit:
        return list(images)
    last = len(images) - 1
    return [images[round(i * last / (limit - 1))] for i in range(limit)]


def embed_images(run: Run) -> list[dict[str, Any]]:
    """Return the images of a run for the page; add a warning to ``run`` for those left out.

    Returns:
        Per image ``step``, ``width`` and ``height`` of the original in pixels, and ``src``, a data
        URI.
    """
    if len(run.images) > MAX_IMAGES:
        run.warnings.append(f"{MAX_IMAGES} of {len(run.images)} sample images are shown")
    embedded = []
    for logged in select_evenly(run.images):
        try:
            width, height, source = _data_uri(logged)
        except (ImageError, OSError) as error:
            run.warnings.append(f"{logged.path.name} is not a readable image ({error}): left out")
            continue
        embedded.append({"step": logged.step, "width": width, "height": height, "src": source})
    return embedded


def _data_uri(logged: LoggedImage) -> tuple[int, int, str]:
    content = storage.read_bytes(logged.path)
    with open_image(content) as image:
        size = image.size
        image.load()
        kind = "png"
        if len(content) > MAX_UNCOMPRESSED:
            image = image.convert("RGB")
            image.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH), Image.Resampling.LANCZOS)
            out = io.BytesIO()
            image.save(out, format="webp", quality=85)
            content, kind = out.getvalue(), "webp"
    return *size, f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
