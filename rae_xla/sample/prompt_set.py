"""Set of images from prompts: a folder that an interrupted command can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.config.paths import StoragePath
from rae_xla.sample.prompt_files import PromptFiles
from rae_xla.sample.prompts import Prompt
from rae_xla.sample.row_sampler import GeneratedBatch
from rae_xla.sample.sample_set import (
    LATENTS_FILE,
    claim_folder,
    create_latents,
    generate_missing,
    open_latents,
)
from rae_xla.sample.text_to_image import TextToImagePipeline, describe_sampling


@dataclass(frozen=True)
class PromptSet:
    """What a set consists of.

    Attributes:
        out: folder, local or ``gs://``, shared by all processes.
        prompts: of the set.
        per_prompt: images of each prompt.
        seed: of the noise.
        layout: one of ``prompt_files.LAYOUTS``.
        keep_latents: also write ``latents.npy``, float32 (N, C, h, w), which needs a local folder.
    """

    out: StoragePath
    prompts: Sequence[Prompt]
    per_prompt: int
    seed: int
    layout: str = "flat"
    keep_latents: bool = False

    def files(self) -> PromptFiles:
        """Return its image files."""
        return PromptFiles(self.out, self.layout, self.prompts, self.per_prompt)

    def describe(self) -> dict[str, Any]:
        """Return what its images depend on, besides the pipeline."""
        texts = json.dumps([[prompt.name, prompt.text] for prompt in self.prompts])
        return {
            "prompts": hashlib.sha256(texts.encode()).hexdigest(),
            "num_prompts": len(self.prompts),
            "images_per_prompt": self.per_prompt,
            "layout": self.layout,
            "keep_latents": self.keep_latents,
        }


def claim_prompt_set(images: PromptSet, pipeline: TextToImagePipeline) -> None:
    """Record the settings of a set in its folder, or check those that it has.

    All processes must call this.

    Raises:
        UserError: the folder has images of another set, or cannot be written.
    """
    settings = describe_sampling(pipeline, images.seed) | images.describe()
    files = images.files()
    claim_folder(images.out, settings, pipeline.sampler.backend, lambda old: bool(files.existing()))


def write_prompt_set(
    images: PromptSet, pipeline: TextToImagePipeline, *, batch: int, workers: int = 4
) -> None:
    """Generate the images that a set lacks; all processes take part.

    Args:
        images: the set, which :func:`claim_prompt_set` has accepted.
        pipeline: generates the images.
        batch: images at a time over all devices; on CPUs it does not change them.
        workers: threads per process that write PNGs.
    """
    sampler = pipeline.sampler
    backend, files = sampler.backend, images.files()
    latents_path = Path(images.out / LATENTS_FILE)
    message = ""
    if backend.process_index == 0:
        files.prepare()
        existing = files.existing()
        if images.keep_latents:
            create_latents(latents_path, (files.count, *sampler.latent_size))
            kept = open_latents(latents_path, "r")
            existing = {i for i in existing if kept[i, 0].any()}
        message = json.dumps([i for i in range(files.count) if i not in existing])
    missing = json.loads(backend.all_gather_text(message)[0])
    if missing:
        latents = open_latents(latents_path, "r+") if images.keep_latents else None
        size = sampler.rows_per_device(min(batch, files.count))
        start = _starter(images, pipeline)
        generate_missing(start, backend, missing, files, latents, size=size, workers=workers)
    backend.all_gather_text("written")  # a barrier: process 0 reads what the others wrote
    if backend.process_index == 0:
        files.finish()


def _starter(
    images: PromptSet, pipeline: TextToImagePipeline
) -> Callable[[Tensor, Tensor], Callable[[], GeneratedBatch]]:
    """Return a function that starts images, given their indices and which are requested."""
    sampler, per_prompt = pipeline.sampler, images.per_prompt
    texts = [prompt.text for prompt in images.prompts]
    tokens = sampler.tokens(texts)
    rows = sampler.rows(
        [text for text in texts for _ in range(per_prompt)],
        [of_prompt for of_prompt in tokens for _ in range(per_prompt)],
        [number for _ in texts for number in range(per_prompt)],
    )

    def start(indices: Tensor, requested: Tensor) -> Callable[[], GeneratedBatch]:
        part = {name: tensor[indices.long()] for name, tensor in rows.items()}
        return sampler.start_rows(images.seed, part, requested, keep_latents=images.keep_latents)

    return start
