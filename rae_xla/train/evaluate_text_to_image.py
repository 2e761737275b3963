"""The validation losses of a text-to-image checkpoint, as training measures them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from rae_xla.config import RunConfig
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.interop.text_to_image import flow_of, load_text_to_image
from rae_xla.models.rae import RAE
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend
from rae_xla.train.tasks.text_to_image import TextToImageTask
from rae_xla.train.text_to_image_losses import TextToImageLosses
from rae_xla.train.text_to_image_model import section_of
from rae_xla.train.text_to_image_validation import ValidationLoss


@dataclass(frozen=True)
class ValidationReport:
    """Validation losses of a checkpoint.

    Attributes:
        losses: by name, without ``eval/``.
        images: number of samples.
        data: path of the captions.
        checkpoint: where the model is from.
        weights: part of the checkpoint.
    """

    losses: dict[str, float]
    images: int
    data: str
    checkpoint: str
    weights: str

    def describe(self) -> dict[str, Any]:
        """Return the entries of a JSON report besides the losses."""
        names = ("checkpoint", "weights", "data", "images")
        return {name: getattr(self, name) for name in names}


def evaluate_text_to_image(
    config: RunConfig, backend: Backend, source: str, part: str = "ema", *, progress: bool = False
) -> ValidationReport:
    """Measure the losses of a model on held-back captions; all processes call this together.

    They equal ``eval/image_loss`` and the others of a run at the same step.

    Args:
        config: of the run, with an ``eval`` section.
        backend: with a mesh of data parallelism alone.
        source: see ``interop.text_to_image.load_text_to_image``.
        part: of a checkpoint: ``ema`` or ``model``.
        progress: show a progress bar.

    Raises:
        UserError: model, encoder and captions do not fit each other, or one is missing.
    """
    settings = section_of(config)
    if config.stage_1 is None:
        raise UserError(
            "validation_loss needs a stage_1 section: the encoder whose latents the head generates"
        )
    rae = cast("RAE", instantiate(config.stage_1)).eval().requires_grad_(False)
    losses = TextToImageLosses(settings, rae, flow_of(config), config.training.global_seed)
    validate = ValidationLoss(
        config,
        backend,
        lambda data: TextToImageTask.validation_rows(config, data),
        losses.validation_sums,
    )
    loaded = load_text_to_image(source, part)
    channels, height, width = rae.latent_size
    found = (loaded.model.settings.channels, loaded.model.settings.tokens)
    if found != (channels, height * width):
        raise UserError(
            f"{source} generates {found[1]} tokens of {found[0]} channels, but the encoder of "
            f"stage_1 has {height * width} of {channels}: choose the one it was trained with"
        )
    for module in (rae, loaded.model.requires_grad_(False)):
        backend.place(module)
    with progress_bar(total=validate.batches, unit="batch", disable=not progress) as bar:

        def report() -> None:
            bar.update(1)

        values = validate(loaded.model, report)
    weights = "published" if loaded.config is None else part
    return ValidationReport(values, validate.count, validate.path, loaded.name, weights)
