"""Sets of images of prompts, in the folder layouts of ``rae-xla sample`` and ``generate``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rae_xla.config.paths import StoragePath
from rae_xla.sample.generated_folder import write_generated_folder
from rae_xla.sample.images import save_png
from rae_xla.sample.prompt_files import PromptFiles
from rae_xla.sample.prompts import Prompt

PROMPTS = ("a red square", "a blue cat", "zebra\u2028crossing")
PER_PROMPT = 2


def noisy_colours(count: int, side: int = 40, seed: int = 0) -> np.ndarray:
    """Return images (N, side, side, 3) of random colours with noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (count, side, side, 3))
    return (rng.integers(0, 196, (count, 1, 1, 3)) + noise).astype(np.uint8)


def write_prompted_set(folder: Path, layout: str) -> tuple[Path, np.ndarray, list[str]]:
    """Write two images of each of ``PROMPTS``; return the folder, the images and their prompts.

    ``layout`` is one of those of ``rae-xla sample``, or ``generate``.
    """
    texts = [text for text in PROMPTS for _ in range(PER_PROMPT)]
    pixels = noisy_colours(len(texts))
    if layout == "generate":
        folder.mkdir(exist_ok=True)
        labels = [i // PER_PROMPT for i in range(len(texts))]
        details = [{"prompt": text, "number": i % PER_PROMPT} for i, text in enumerate(texts)]
        write_generated_folder(folder, pixels, labels, PROMPTS, {}, details=details)
        return folder, pixels, texts
    prompts = [Prompt(text, f"p{i}") for i, text in enumerate(PROMPTS)]
    files = PromptFiles(StoragePath(folder), layout, prompts, PER_PROMPT)
    files.prepare()
    for i, image in enumerate(pixels):
        save_png(files.path(i), image)
    files.finish()
    return folder, pixels, texts
