"""Pictures by name: a model and some classes in, pictures out.

    pipeline = load_pipeline("ditdh-xl-256", cfg_scale=1.8)
    pictures = pipeline(["golden retriever", 388], num_samples=8, seed=42)

A model is a published one by its short name, a configuration file, or the folder of a run; whatever
published file it needs is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from rae_xla.data.class_names import find_class, imagenet_names
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.sample.find_model import Found, find_model, with_files
from rae_xla.sample.generate import ImageSampler
from rae_xla.sample.labels import make_labels
from rae_xla.sample.pictures import Pixels

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

BATCH = 8
SDE_STEPS = 250  # as published: the stochastic solver needs more of them than the ODE's 50
IMAGENET = 1000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pipeline:
    """A model that is ready to draw.

    Attributes:
        config: what it was built from.
        sampler: draws batches.
        class_names: by label.
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
        batch_size: int = BATCH,
    ) -> list[Image.Image]:
        """Draw pictures of classes, in turn; of random classes where none are named.

        Picture i depends on the seed, on i and on its class alone, not on ``batch_size``.

        Raises:
            UserError: a class the model does not know, or a number below 1.
        """
        labels = choose_labels(classes, self.class_names, num_samples, seed)
        pixels = self.draw(labels, seed=seed, batch_size=batch_size)
        return [Image.fromarray(picture) for picture in pixels]

    def draw(
        self,
        labels: Sequence[int],
        *,
        seed: int,
        batch_size: int = BATCH,
        progress: Progress | None = None,
    ) -> Pixels:
        """Pictures (N, H, W, 3) uint8 of N class numbers; in every process, if there are several.

        ``progress`` is called with (solver steps done, solver steps in all).
        """
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} cannot be drawn: give 1 or more")
        batch = min(batch_size, len(labels))
        starts = range(0, len(labels), batch)
        drawn = []
        for number, first in enumerate(starts):
            # every batch has the same shape; the last is filled up with its own last picture
            rows = torch.arange(first, first + batch, dtype=torch.int32).clamp(max=len(labels) - 1)
            chosen = torch.tensor([labels[row] for row in rows.tolist()])
            report = progress and _shifted(progress, number, len(starts))
            drawn.append(torch.from_numpy(self.sampler(seed, rows, chosen, report)))
        pixels: Pixels = torch.cat(drawn)[: len(labels)].numpy()
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
) -> Pipeline:
    """Build a model on the devices of this machine, downloading what was published of it.

    Args:
        model: a published name (``published.GENERATORS``), a YAML file, a run's results folder, or
            a folder or hub id of a saved diffusion transformer; see ``find_model``.
        rae: the autoencoder of the last.
        cfg_scale: guidance scale; 1 is none, None what the model's configuration says. It guides by
            the method of that configuration: classifier-free, or autoguidance.
        num_steps: points of the solver's time grid; None: the configuration's.
        mode: ``ode`` or ``sde``; None: the configuration's.
        overrides: further settings, ``key=value``, such as ``runtime.precision=bf16``.
        class_names: by label; None: ImageNet's for a model of 1,000 classes, else numbers.

    Raises:
        UserError: there is no such model, or its files are missing or do not fit.
    """
    settings = sampling_overrides(cfg_scale, num_steps, mode)
    found = find_model(model, [*overrides, *settings], rae)
    return build_pipeline(found, names_of_classes(found, class_names))


def build_pipeline(found: Found, class_names: tuple[str, ...]) -> Pipeline:
    """Download what is missing, and build the model; see ``load_pipeline``."""
    found = with_files(found)
    config = found.config
    seed = config.training.global_seed
    runtime = start(config.runtime, config.mesh, seed=seed, same_bits=True)
    return Pipeline(config, found.load(runtime), class_names)


def choose_labels(
    classes: Sequence[str | int] | str | int, class_names: Sequence[str], count: int, seed: int
) -> list[int]:
    """The class numbers of ``count`` pictures that show ``classes`` in turn, or random ones.

    A class is a name (``data.class_names.find_class``) or a number; one alone need be in no list.

    Raises:
        UserError: a class that is none of ``class_names``, or no pictures at all.
    """
    if count < 1:
        raise UserError(f"{count} pictures cannot be drawn: ask for 1 or more")
    several = [classes] if isinstance(classes, (str, int)) else classes
    numbers = [find_class(c, class_names) if isinstance(c, str) else int(c) for c in several]
    for number in numbers:
        if not 0 <= number < len(class_names):
            raise UserError(
                f"class {number} is out of range; the model knows 0 to {len(class_names) - 1}"
            )
    spec = ",".join(map(str, numbers)) or "random"
    return [int(label) for label in make_labels(spec, count, len(class_names), seed)]


def sampling_overrides(
    cfg_scale: float | None, num_steps: int | None, mode: str | None
) -> list[str]:
    """The settings of a configuration that the three stand for.

    Raises:
        UserError: a scale below 1, no steps, or another mode.
    """
    settings = []
    if cfg_scale is not None:
        if not 1 <= cfg_scale < float("inf"):
            raise UserError(
                f"a guidance scale of {cfg_scale:g} guides nowhere: 1 is none, 1.8 some"
            )
        settings.append(f"guidance.scale={cfg_scale}")
    if mode is not None:
        if mode.lower() not in ("ode", "sde"):
            raise UserError(f"mode {mode!r}: say ode or sde")
        settings.append(f"sampler.mode={mode.upper()}")
        if mode.lower() == "sde" and num_steps is None:
            num_steps = SDE_STEPS
    if num_steps is not None:
        if num_steps < 2:
            raise UserError(f"{num_steps} points of time are no grid: give 2 or more")
        settings.append(f"sampler.params.num_steps={num_steps}")
    return settings


def names_of_classes(found: Found, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of a model's classes by label: those given, ImageNet's for a thousand, those of
    the data it was trained on, or numbers.

    Raises:
        UserError: more or fewer names were given than there are classes.
    """
    count = found.config.misc.num_classes
    if given is None and count == IMAGENET:
        return imagenet_names()
    if given is None:
        own = found.class_names
        return own if own is not None and len(own) == count else tuple(map(str, range(count)))
    if len(given) != count:
        raise UserError(f"{len(given)} class names were given; the model has {count} classes")
    return tuple(given)


def _shifted(progress: Progress, batch: int, batches: int) -> Progress:
    """Progress of one batch as that of all."""
    return lambda done, steps: progress(batch * steps + done, batches * steps)
