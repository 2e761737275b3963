"""Pipeline: generate images of named classes, or of prompts, from a model's name.

    pipeline = load_pipeline("ditdh-xl-256", cfg_scale=1.8)
    images = pipeline(["golden retriever", 388], num_samples=8, seed=42)

    pipeline = load_pipeline("scale-rae-qwen1.5b", cfg_scale=3.0)
    images = pipeline("a cat on a windowsill", num_images=4, seed=42)

A model is given by its published name, a configuration file, or the folder of a run. Published
files are downloaded when they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from rae_xla.errors import UserError
from rae_xla.moved import moved_names
from rae_xla.runtime import start
from rae_xla.sample.images import Pixels
from rae_xla.sample.labels import choose_labels
from rae_xla.sample.model_lookup import (
    ResolvedModel,
    download_files,
    resolve_class_names,
    resolve_model,
)
from rae_xla.sample.sampler import ImageSampler, Progress, part_of_progress
from rae_xla.sample.text_to_image import build_text_to_image_pipeline
from rae_xla.sample.text_to_image_lookup import is_text_to_image, resolve_text_to_image

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

__getattr__ = moved_names(
    __name__, {"names_of_classes": "rae_xla.sample.model_lookup.resolve_class_names"}
)

DEFAULT_BATCH_SIZE = 8
SDE_STEPS = 250
"""Points of the time grid for SDE sampling: as published, more than the ODE's 50."""


@dataclass(frozen=True)
class Pipeline:
    """A loaded model that generates images of named classes.

    Attributes:
        config: the configuration that it was built from.
        sampler: generates batches of images.
        class_names: class names by label.
    """

    config: RunConfig
    sampler: ImageSampler
    class_names: tuple[str, ...]

    def __call__(
        self,
        classes: Sequence[str | int] | str | int = (),
        *,
        num_samples: int = 8,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[Image.Image]:
        """Generate images.

        Image i is a function of the seed, i and its class; ``batch_size`` does not change it.

        Args:
            classes: class names or labels, which the images show in turn; empty for random ones.
            num_samples: number of images.
            seed: seed of the noise, and of random classes.
            batch_size: images generated at a time.

        Raises:
            UserError: if a class is unknown, or a number is below 1.
        """
        labels = choose_labels(classes, self.class_names, num_samples, seed)
        pixels = self.generate(labels, seed=seed, batch_size=batch_size)
        return [Image.fromarray(image) for image in pixels]

    def generate(
        self,
        labels: Sequence[int],
        *,
        seed: int,
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Pixels:
        """Generate images of N labels as arrays; every process gets all of them.

        Args:
            labels: N class labels.
            seed: seed of the noise.
            batch_size: images generated at a time.
            progress: called with (solver steps done, solver steps in total, over all batches).

        Returns:
            (N, H, W, 3) uint8.

        Raises:
            UserError: if ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}: give 1 or more")
        batch = min(batch_size, len(labels))
        starts = range(0, len(labels), batch)
        outputs = []
        for number, first in enumerate(starts):
            # Every batch has the same shape, for one compilation: the last image pads the last one.
            indices = torch.arange(first, first + batch, dtype=torch.int32)
            indices = indices.clamp(max=len(labels) - 1)
            batch_labels = torch.tensor([labels[i] for i in indices.tolist()])
            report = part_of_progress(progress, number, len(starts))
            outputs.append(torch.from_numpy(self.sampler(seed, indices, batch_labels, report)))
        pixels: Pixels = torch.cat(outputs)[: len(labels)].numpy()
        return pixels


def load_pipeline(
    model: str | Path = "ditdh-xl-256",
    *,
    rae: str | Path | None = None,
    cfg_scale: float | None = None,
    num_steps: int | None = None,
    mode: str | None = None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    tokenizer: str | Path | None = None,
    request: str | None = None,
    write_text: bool | None = None,
) -> Any:
    """Load a model on the devices of this machine; published files are downloaded.

    Args:
        model: a published name (``published.GENERATORS`` or ``TEXT_TO_IMAGE``), a YAML file, a
            run's results folder, or a folder or hub id of a saved model; see
            ``model_lookup.resolve_model`` and ``text_to_image_lookup.resolve_text_to_image``.
        rae: the autoencoder of a saved diffusion transformer or text-to-image model.
        cfg_scale: guidance scale; 1 disables guidance, None keeps the configuration's. The
            configuration also decides the method: classifier-free guidance or autoguidance.
        num_steps: points of the solver's time grid, or evaluations of a text-to-image model; None
            keeps the configuration's.
        mode: ``ode`` or ``sde``; None keeps the configuration's.
        overrides: further settings, ``key=value``, such as ``runtime.precision=bf16``.
        class_names: class names by label; None for ImageNet's (1,000 classes), those recorded by
            the run, or the labels.
        tokenizer: text-to-image: folder of ``tokenizer.json``; None: that of the model.
        request: text-to-image: form of a request, with ``{caption}``; None: that of the model.
        write_text: text-to-image: whether the model first answers in text; None: only published
            models.

    Returns:
        A :class:`Pipeline` for a class-conditional model, and a
        ``text_to_image.TextToImagePipeline`` for a text-to-image model.

    Raises:
        UserError: if there is no such model, its files are missing or do not match, or options of
            the other kind are given.
    """
    settings = sampling_overrides(cfg_scale, num_steps, mode)
    prompted = {"tokenizer": tokenizer, "request": request, "write_text": write_text}
    if is_text_to_image(str(model)):
        if class_names is not None:
            raise UserError(f"{model} generates from prompts: leave out class_names")
        resolved_text = resolve_text_to_image(
            str(model),
            [*overrides, *settings],
            rae=None if rae is None else str(rae),
            tokenizer=None if tokenizer is None else str(tokenizer),
            request=request,
            write_text=write_text,
        )
        return build_text_to_image_pipeline(resolved_text)
    if given := [name for name, value in prompted.items() if value is not None]:
        raise UserError(f"{model} generates classes: leave out {', '.join(given)}")
    resolved = resolve_model(model, [*overrides, *settings], rae)
    return build_pipeline(resolved, resolve_class_names(resolved, class_names))


def build_pipeline(model: ResolvedModel, class_names: tuple[str, ...]) -> Pipeline:
    """Download missing files, start the backend and load the model; see :func:`load_pipeline`."""
    model = download_files(model)
    config = model.config
    seed = config.training.global_seed
    backend = start(config.runtime, config.mesh, seed=seed, same_bits=True)
    return Pipeline(config, model.load(backend), class_names)


def sampling_overrides(
    cfg_scale: float | None, num_steps: int | None, mode: str | None
) -> list[str]:
    """Translate the three sampling options to configuration overrides.

    Raises:
        UserError: if the scale is below 1, there are fewer than two steps, or the mode is unknown.
    """
    settings = []
    if cfg_scale is not None:
        if not 1 <= cfg_scale < float("inf"):
            raise UserError(
                f"guidance scale {cfg_scale:g} is invalid: 1 disables guidance, larger values "
                "such as 1.8 guide"
            )
        settings.append(f"guidance.scale={cfg_scale}")
    if mode is not None:
        if mode.lower() not in ("ode", "sde"):
            raise UserError(f"mode {mode!r} is unknown: give ode or sde")
        settings.append(f"sampler.mode={mode.upper()}")
        if mode.lower() == "sde" and num_steps is None:
            num_steps = SDE_STEPS
    if num_steps is not None:
        if num_steps < 2:
            raise UserError(
                f"a time grid needs at least 2 points, not {num_steps}: raise the steps"
            )
        settings.append(f"sampler.params.num_steps={num_steps}")
    return settings
