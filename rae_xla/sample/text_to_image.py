"""Images from prompts: a text-to-image pipeline.

pipeline = load_pipeline("scale-rae-qwen1.5b", cfg_scale=3.0)  # rae_xla.sample.pipeline
images = pipeline("a cat on a windowsill", num_images=4)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image

from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.sample.denoiser import Progress
from rae_xla.sample.prompt_sampler import PromptSampler
from rae_xla.sample.prompts import check_prompts
from rae_xla.sample.row_sampler import Latents, part_of_progress
from rae_xla.sample.text_to_image_lookup import ResolvedTextToImage, download_text_to_image

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend
    from rae_xla.sample.images import Pixels

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class TextToImagePipeline:
    """A loaded text-to-image model.

    Attributes:
        sampler: generates batches of images.
        name: where the weights are from.
        weights: SHA-256 of the weights of each part.
        question: that training asks about an image.
    """

    sampler: PromptSampler
    name: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    question: str = "Describe the image."

    @property
    def config(self) -> RunConfig:
        """Its sampler and guidance settings."""
        return self.sampler.config

    def configured(
        self,
        *,
        cfg_scale: float | None = None,
        num_steps: int | None = None,
        mode: str | None = None,
        interval: tuple[float, float] | None = None,
    ) -> TextToImagePipeline:
        """Return a pipeline of the same models with other settings; None keeps one.

        Args:
            cfg_scale: guidance scale; 1 disables guidance.
            num_steps: evaluations of the head.
            mode: ``ode`` or ``sde``.
            interval: (smallest, largest) shifted time with guidance.

        Raises:
            UserError: a setting is invalid, or the model cannot be guided.
        """
        config = with_sampling(self.config, cfg_scale, num_steps, mode, interval)
        return (
            self
            if config == self.config
            else replace(self, sampler=self.sampler.configured(config))
        )

    def __call__(
        self,
        prompts: Sequence[str] | str,
        *,
        num_images: int = 1,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        cfg_scale: float | None = None,
        num_steps: int | None = None,
        mode: str | None = None,
    ) -> list[Image.Image]:
        """Generate images of prompts, those of the first prompt first.

        Image i of a prompt is a function of the seed, the prompt and i.

        Args:
            prompts: one or several.
            num_images: of each prompt.
            seed: of the noise.
            batch_size: images generated at a time.
            cfg_scale: guidance scale; 1 disables guidance, None keeps that of the pipeline.
            num_steps: evaluations of the head; None keeps that of the pipeline.
            mode: ``ode`` or ``sde``; None keeps that of the pipeline.

        Raises:
            UserError: a prompt is empty or too long, or the model cannot be guided.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        pipeline = self.configured(cfg_scale=cfg_scale, num_steps=num_steps, mode=mode)
        pixels, _ = pipeline.generate(prompts, num_images, seed=seed, batch_size=batch_size)
        return [Image.fromarray(image) for image in pixels]

    def generate(
        self,
        prompts: Sequence[str],
        num_images: int = 1,
        *,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Progress | None = None,
        keep_latents: bool = False,
    ) -> tuple[Pixels, Latents | None]:
        """Generate images as arrays; every process gets all of them. See ``__call__``.

        Args:
            prompts: their texts.
            num_images: of each prompt.
            seed: of the noise.
            batch_size: images generated at a time.
            progress: called with (solver steps done, solver steps in total, over all batches).
            keep_latents: return the latents too.

        Returns:
            Images (N, H, W, 3) uint8, and their latents (N, C, h, w) float32, on request.

        Raises:
            UserError: a prompt is empty or too long, or a number is below 1.
        """
        check_prompts(prompts)
        if num_images < 1 or batch_size < 1:
            raise UserError("the numbers of images and of a batch must be at least 1")
        numbers = [i for _ in prompts for i in range(num_images)]
        return self.generate_numbered(
            [prompt for prompt in prompts for _ in range(num_images)],
            numbers,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            keep_latents=keep_latents,
        )

    def generate_numbered(
        self,
        prompts: Sequence[str],
        numbers: Sequence[int],
        *,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Progress | None = None,
        keep_latents: bool = False,
    ) -> tuple[Pixels, Latents | None]:
        """Generate one image for each of N prompts, given its number among those of its prompt.

        See :meth:`generate`.
        """
        sampler, count = self.sampler, len(prompts)
        unique = list(dict.fromkeys(prompts))
        tokens = dict(zip(unique, sampler.tokens(unique), strict=True))
        rows = sampler.rows(prompts, [tokens[prompt] for prompt in prompts], numbers)
        size = sampler.rows_per_device(batch_size) * sampler.backend.mesh.batch_shards
        size = min(max(size, batch_size), count)
        starts = range(0, count, size)
        outputs = []
        for number, first in enumerate(starts):
            # Every batch has the same shape, for one compilation: the last image pads the last one.
            index = torch.arange(first, first + size).clamp(max=count - 1)
            part = {name: tensor[index] for name, tensor in rows.items()}
            report = part_of_progress(progress, number, len(starts))
            outputs.append(sampler.generate_rows(seed, part, report, keep_latents=keep_latents))
        pixels = np.concatenate([output["pixels"].numpy() for output in outputs])[:count]
        if not keep_latents:
            return cast("Pixels", pixels), None
        latents = np.concatenate([output["latents"].float().numpy() for output in outputs])
        return cast("Pixels", pixels), latents[:count]


def build_text_to_image_pipeline(model: ResolvedTextToImage) -> TextToImagePipeline:
    """Download missing files, start the backend and load the model.

    Raises:
        UserError: files are missing or do not fit each other.
    """
    model = download_text_to_image(model)
    config = model.config
    seed = config.training.global_seed
    backend = start(config.runtime, config.mesh, seed=seed, same_bits=True)
    return load_on(model, backend)


def load_on(model: ResolvedTextToImage, backend: Backend) -> TextToImagePipeline:
    """Load a model whose files are local on a backend that has been started."""
    loaded = model.load(backend)
    return TextToImagePipeline(loaded.sampler, loaded.name, loaded.weights, model.question)


def with_sampling(
    config: RunConfig,
    cfg_scale: float | None = None,
    num_steps: int | None = None,
    mode: str | None = None,
    interval: tuple[float, float] | None = None,
) -> RunConfig:
    """Return a configuration with other sampler and guidance settings; None keeps one.

    Raises:
        UserError: a setting is invalid.
    """
    guidance: dict[str, Any] = {}
    if cfg_scale is not None:
        if not 1 <= cfg_scale < float("inf"):
            raise UserError(
                f"guidance scale {cfg_scale:g} is invalid: 1 disables guidance, larger values such "
                "as 3 guide"
            )
        guidance["scale"] = float(cfg_scale)
    if interval is not None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"the guidance interval ({low:g}, {high:g}) is invalid: give two times from 0 "
                "(data) to 1 (noise), the smaller one first"
            )
        guidance |= {"t_min": float(low), "t_max": float(high)}
    sampler = config.sampler
    if mode is not None:
        if mode.lower() not in ("ode", "sde"):
            raise UserError(f"mode {mode!r} is unknown: give ode or sde")
        sampler = replace(sampler, mode=cast("Any", mode.upper()))
    if num_steps is not None:
        if num_steps < (least := 2 if sampler.mode == "SDE" else 1):
            raise UserError(f"{num_steps} steps are too few: give {least} or more")
        sampler = replace(sampler, params=replace(sampler.params, num_steps=num_steps))
    return replace(config, guidance=replace(config.guidance, **guidance), sampler=sampler)


def describe_sampling(pipeline: TextToImagePipeline, seed: int) -> dict[str, Any]:
    """Return what the images of a pipeline depend on, for a manifest."""
    tree, form = pipeline.config.to_dict(), pipeline.sampler.form
    guidance = tree["guidance"]
    return {
        "model": pipeline.name,
        "weights": pipeline.weights,
        "seed": seed,
        "guidance": {name: guidance[name] for name in ("method", "scale", "t_min", "t_max")},
        "sampler": tree["sampler"],
        "precision": pipeline.config.runtime.precision,
        "request": form.request,
        "answer": form.answer,
        "write_text": form.write_text,
    }
