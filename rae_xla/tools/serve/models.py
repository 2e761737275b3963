"""Models of the page: class-conditional or text-to-image, behind one function."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rae_xla.sample.images import Pixels
from rae_xla.sample.labels import choose_labels
from rae_xla.sample.pipeline import Pipeline
from rae_xla.sample.prompts import check_prompts
from rae_xla.sample.text_to_image import (
    TextToImagePipeline,
    describe_sampling,
    with_sampling,
)
from rae_xla.tools.serve.jobs import Request

_LABEL = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class ServedModel:
    """What the page needs of a model.

    Attributes:
        name: shown on the page.
        kind: ``prompt`` or ``class``.
        defaults: initial values of guidance, steps and number of images.
        settings: of the model, for manifests.
        generate: see ``jobs.Generate``.
        check: raises ``UserError`` for a text that cannot be generated.
    """

    name: str
    kind: str
    defaults: dict[str, Any]
    settings: dict[str, Any]
    generate: Callable[[Request, Callable[[int, int], None]], Pixels]
    check: Callable[[str], None]


def served_model(name: str, pipeline: Pipeline | TextToImagePipeline) -> ServedModel:
    """Return the model of a pipeline."""
    config = pipeline.config
    defaults = {
        "guidance": max(1.0, config.guidance.scale),
        "steps": config.sampler.params.num_steps,
        "images": 1,
    }
    if isinstance(pipeline, TextToImagePipeline):
        settings = describe_sampling(pipeline, 0)
        return ServedModel(
            name,
            "prompt",
            defaults,
            settings,
            lambda request, report: _from_prompt(pipeline, request, report),
            lambda text: check_prompts([text]),
        )
    settings = {"model": name, **{k: config.to_dict()[k] for k in ("sampler", "guidance")}}
    return ServedModel(
        name,
        "class",
        defaults,
        settings,
        lambda request, report: _from_classes(pipeline, request, report),
        lambda text: _check_classes(pipeline, text),
    )


def _from_prompt(
    pipeline: TextToImagePipeline, request: Request, report: Callable[[int, int], None]
) -> Pixels:
    chosen = pipeline.configured(cfg_scale=request.guidance, num_steps=request.steps)
    pixels, _ = chosen.generate([request.text], request.images, seed=request.seed, progress=report)
    return pixels


def _from_classes(
    pipeline: Pipeline, request: Request, report: Callable[[int, int], None]
) -> Pixels:
    names = pipeline.class_names
    labels = choose_labels(_classes(request.text, names), names, request.images, request.seed)
    config = with_sampling(pipeline.config, request.guidance, max(2, request.steps))
    chosen = Pipeline(config, pipeline.sampler.configured(config), names)
    return chosen.generate(labels, seed=request.seed, progress=report)


def _check_classes(pipeline: Pipeline, text: str) -> None:
    """Raise ``UserError`` if a class in a text is unknown."""
    choose_labels(_classes(text, pipeline.class_names), pipeline.class_names, 1, 0)


def _classes(text: str, names: Sequence[str]) -> list[str | int]:
    """Return the classes in a text, separated by commas; none: random ones.

    A number is a label, unless there are classes whose names are numbers.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    named = any(name.isdecimal() for name in names)
    return [int(word) if _LABEL.fullmatch(word) and not named else word for word in words]
