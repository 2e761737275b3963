"""How well generated images show their prompts: the CLIPScore of image sets."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.errors import UserError
from rae_xla.evaluate.generation import GenReport
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend
from rae_xla.sample.clip import ClipScorer
from rae_xla.sample.images import Pixels
from rae_xla.sample.prompted_images import PromptedImage

CLIP_SCORE = "clip_score"

_AHEAD = 8  # images that are decoded while the previous ones are scored


def clip_score(
    images: Sequence[PromptedImage],
    scorer: ClipScorer,
    backend: Backend,
    *,
    progress: bool = False,
) -> float:
    """Return the CLIPScore of a set as torchmetrics defines it: the mean of 100 cos, at least 0.

    Every process scores a share of the images, one image at a time, so that the score depends on
    neither batches nor processes. All processes must call this; all get the score.

    Raises:
        UserError: an image cannot be read, or a score is not finite.
    """
    own = images[backend.process_index :: backend.process_count]
    found: list[float] = []
    quiet = not progress or backend.process_index != 0
    with (
        ThreadPoolExecutor(_AHEAD) as readers,
        progress_bar(total=len(own), unit="image", desc="CLIPScore", disable=quiet) as bar,
    ):
        for first in range(0, len(own), _AHEAD):
            part = own[first : first + _AHEAD]
            for image, pixels in zip(part, readers.map(_read, part), strict=True):
                found += scorer.similarities(pixels[None], [image.prompt])
                bar.update(1)
    parts = [json.loads(text) for text in backend.all_gather_text(json.dumps(found))]
    values = [value for part in parts for value in part]
    if not all(map(math.isfinite, values)):
        raise UserError(f"some CLIPScores are not finite: check the weights in {scorer.folder}")
    # fmean is correctly rounded: the order of the processes does not matter.
    return max(statistics.fmean(values), 0.0)


def cut_prompts_warning(images: Sequence[PromptedImage], scorer: ClipScorer) -> tuple[str, ...]:
    """Return a warning if prompts are longer than CLIP's text encoder reads."""
    prompts = {image.prompt for image in images}
    if not (cut := sum(map(scorer.is_cut, prompts))):
        return ()
    return (
        f"{cut} of {len(prompts)} prompts are longer than the {scorer.text_length} tokens that "
        f"CLIP reads, and were cut: {CLIP_SCORE} does not measure what follows",
    )


def with_clip_scores(
    report: GenReport, scores: Mapping[str, float], warnings: Sequence[str] = ()
) -> GenReport:
    """Return a report of sets with their CLIPScores, by the name of the set."""
    sets = tuple((name, {CLIP_SCORE: scores[name], **metrics}) for name, metrics in report.sets)
    return replace(report, sets=sets, warnings=(*report.warnings, *warnings))


def _read(image: PromptedImage) -> Pixels:
    try:
        pixels: Any = np.asarray(decode_rgb(image.path.read_bytes()))
    except (ImageError, OSError) as error:
        raise UserError(
            f"{image.path}: not a readable image ({error}): generate it again"
        ) from error
    return pixels
