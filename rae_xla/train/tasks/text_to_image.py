"""Train a language model and a diffusion head together on images with captions (Scale-RAE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rae_xla.checkpoint.provenance import latent_provenance
from rae_xla.checkpoint.train_state import TrainState
from rae_xla.config import GuidanceConfig, RunConfig
from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.data.captions import (
    CaptionChoice,
    CaptionRows,
    RowFormat,
    check_length,
)
from rae_xla.data.mixture import CaptionedMixture, Mixture
from rae_xla.data.prompts import PromptRows
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.interop.text_to_image import flow_of
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.next_token import supervised_tokens
from rae_xla.models.text_to_image.scale_rae import (
    from_published,
    to_published,
    untied,
)
from rae_xla.models.text_to_image.slots import select_rows
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import captioned_grid
from rae_xla.sample.prompt_sampler import PromptSampler, RequestFormat
from rae_xla.sample.text_to_image import TextToImagePipeline
from rae_xla.train.muon import make_optimizer
from rae_xla.train.optimizers import AdamW
from rae_xla.train.schedules import make_schedule
from rae_xla.train.tasks.base import Preview, StateDict, Task
from rae_xla.train.text_to_image_losses import TextToImageLosses
from rae_xla.train.text_to_image_model import (
    build_model,
    freeze,
    section_of,
    tokenizer_folder,
)
from rae_xla.train.text_to_image_step import (
    BySource,
    LossWeights,
    ParameterGroup,
    RowCounts,
    RowLosses,
    make_text_to_image_step,
)
from rae_xla.train.text_to_image_validation import ValidationLoss
from rae_xla.train.train_step import TrainStep

LANGUAGE_MODEL_RATE = "lr_language_model"
"""Name of the learning rate of the language model among the inputs of a step."""


class TextToImageTask(Task):
    """Train the text-to-image model on the latents of a frozen encoder.

    Raises:
        UserError: a section is missing, or model, tokenizer, encoder and data do not fit each
            other.
    """

    weights_key = "text_to_image.ckpt"

    def __init__(
        self, config: RunConfig, backend: Backend, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        super().__init__(config, backend, data, steps_per_epoch)
        self._settings = section_of(config)
        if config.stage_1 is None:
            raise UserError(
                "text-to-image training needs a stage_1 section: the encoder whose latents the "
                "head generates"
            )
        self._flow = flow_of(config)
        self._language_model_schedule = make_schedule(
            self._settings.language_model_optimizer,
            self._settings.language_model_scheduler,
            steps_per_epoch,
        )
        self._rae = cast("RAE", instantiate(config.stage_1)).eval().requires_grad_(False)
        self.frozen = self._rae
        self._losses = TextToImageLosses(
            self._settings, self._rae, self._flow, config.training.global_seed
        )
        channels, height, width = self._rae.latent_size
        self.model = build_model(config, channels, height * width).train()
        freeze(self.model, self._settings.train)
        self._check_rows(backend)
        self.provenance = latent_provenance(self._rae, config.stage_1.params)
        self._source_names: tuple[str, ...] = ()
        self._prompts: list[str] | None = None
        if isinstance(data, CaptionedMixture):
            rows = type(self).row_arrays(config, data)
            self._tokenizer = rows.rows
            self._prompts = rows.first_captions(config.training.num_samples)
            if len(data.sources) > 1:
                self._source_names = data.source_names
        self._validate = None
        if config.eval is not None:
            self._validate = ValidationLoss(
                config,
                backend,
                lambda data: type(self).validation_rows(config, data),
                self._losses.validation_sums,
            )

    @classmethod
    def row_arrays(cls, config: RunConfig, data: Mixture) -> CaptionRows:
        """Return what makes the token rows of captions.

        Raises:
            UserError: the shards have no captions, or the tokenizer cannot be used.
        """
        settings = section_of(config)
        if not isinstance(data, CaptionedMixture):
            raise UserError(
                f"{data.sources[0].folder} has no captions: index the tars with `rae-xla shards "
                "captions SOURCE --out FOLDER`"
            )
        tokens = _latent_tokens(config)
        captions = settings.captions
        if settings.read == "tokens":
            return _prompt_rows(config, settings, data, tokens)
        check_length(settings.length, tokens, settings.images_per_row)
        rows = CaptionRows(
            data.text_tables(),
            tokenizer_folder(settings),
            tokens,
            settings.length,
            config.training.global_seed,
            CaptionChoice(captions.sources, captions.weights, captions.max_chars),
            RowFormat(
                captions.prompts,
                captions.answer,
                captions.question,
                settings.row_pattern,
                config.training.grad_accum_steps,
            ),
            settings.images_per_row,
            settings.answers_per_row,
        )
        _ = rows.rows  # raises here rather than in a worker
        return rows

    @classmethod
    def validation_rows(cls, config: RunConfig, data: Mixture) -> CaptionRows:
        """Return the rows of validation, in which no caption is dropped; see ``row_arrays``."""
        rows = cls.row_arrays(config, data)
        return replace(rows, dropout=0.0) if isinstance(rows, PromptRows) else rows

    def phase(self, step: int) -> Hashable:
        """Return the only phase."""
        return "text and images"

    def inputs(self, step: int) -> dict[str, Tensor]:
        """Return the learning rates of the image part and of the language model."""
        rate = torch.tensor(self._language_model_schedule(step), dtype=torch.float32)
        return {**super().inputs(step), LANGUAGE_MODEL_RATE: rate}

    @property
    def smallest_batch(self) -> int:
        """Fewest rows of a process: the row pattern once in every micro-batch."""
        return self._settings.row_pattern[0] * super().smallest_batch

    def example_batch(self, rows: int, image_size: int) -> dict[str, Tensor]:
        """Return uninitialised rows with images and tokens."""
        length, slots = self._settings.length, self._settings.images_per_row
        example = super().example_batch(rows, image_size) | {
            "ids": torch.empty(rows, length, dtype=torch.int32),
            "labels": torch.empty(rows, length, dtype=torch.int32),
            "truncated": torch.empty(rows),
        }
        if slots > 1:
            shape = (rows, slots, 3, image_size, image_size)
            example["image"] = torch.empty(shape, dtype=torch.uint8)
        if self._source_names:
            example["source"] = torch.empty(rows, dtype=torch.int32)
        return example

    @property
    def first_moment_only(self) -> frozenset[str]:
        """Names of the matrices of the image part, if Muon optimises it."""
        names = super().first_moment_only
        return frozenset(name for name in names if not name.startswith("language_model."))

    def make_step(
        self, phase: Hashable, state: TrainState, backend: Backend | None = None
    ) -> TrainStep:
        """Build the step: both losses, AdamW for each group of parameters, EMA."""
        training, settings = self.config.training, self._settings
        decay = training.ema_decay
        groups = (
            ParameterGroup(
                "language_model",
                "language_model.",
                AdamW.from_config(settings.language_model_optimizer),
                LANGUAGE_MODEL_RATE,
                decay if settings.average_language_model else 0.0,
            ),
            ParameterGroup("image", "", make_optimizer(training), "lr", decay),
        )
        return make_text_to_image_step(
            self.losses,
            self.counts,
            state,
            groups,
            LossWeights(settings.text_loss_weight, settings.image_loss_weight),
            seed=training.global_seed,
            clip_grad=training.clip_grad,
            accumulate=training.grad_accum_steps,
            backend=backend or self.backend,
            skip_norm=training.skip_grad_norm,
            by_source=BySource(self._source_names, settings.row_pattern),
        )

    def counts(self, batch: Batch) -> RowCounts:
        """Return the supervised tokens and the answer images of every row."""
        settings = self._settings
        slots = self._model.slots(
            batch["ids"].long(), batch["labels"].long(), settings.images_per_row
        )
        period, count = self._settings.row_pattern
        accumulate = self.config.training.grad_accum_steps
        chosen = (batch["row"] // accumulate % period < count)[:, None] & slots.answer
        images = chosen.float().sum(1).clamp(max=settings.answers_per_row)
        return RowCounts(supervised_tokens(batch["labels"]), images)

    def losses(self, batch: Batch, draws: CounterRNG) -> RowLosses:
        """Return the losses of every row of a micro-batch."""
        pattern = self._settings.row_pattern
        draws = CounterRNG(draws.seed, draws.step, select_rows(draws.rows, pattern))
        shape = (self._settings.answers_per_row, self._settings.times_per_image)
        t = self._flow.times_from_normal(draws.normal("time", shape))
        probability = self._model.settings.condition_dropout_prob
        if self._settings.read == "tokens":
            probability = 0.0  # the loader has dropped captions
        drop = draws.uniform("condition dropout", shape) < probability if probability else None
        base_weight = self.config.internal_guidance.base_model_coeff
        text, matches, image = self._losses.at(
            self._model, batch, draws, t, drop, pattern, base_weight
        )
        return RowLosses(text, matches, image.mean(2).sum(1))

    def preview(self, state: TrainState) -> Preview | None:
        """Return images of the first captions by the averaged model, without guidance."""
        if self._prompts is None:
            return None
        captions = self._settings.captions
        sampler = PromptSampler(
            replace(self.config, guidance=GuidanceConfig()),
            self.backend,
            cast("TextToImageModel", state.ema),
            self._rae,
            self._flow,
            self._tokenizer,
            RequestFormat(captions.prompts[0], captions.answer),
        )
        seed = self.config.training.global_seed
        pixels, _ = TextToImagePipeline(sampler).generate(self._prompts, seed=seed)
        grid = captioned_grid(pixels, list(range(len(pixels))), self._prompts)
        return Preview(grid, "averaged weights, no guidance, the first captions")

    def evaluate(
        self, state: TrainState, on_progress: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Return the validation losses of the averaged model; see ``ValidationLoss``."""
        if self._validate is None or lite:
            return {}
        found = self._validate(state.ema, on_progress)
        return {f"eval/{name}": value for name, value in found.items()}

    def to_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Convert a state dict of ``model`` to the published layout of Scale-RAE."""
        return to_published(state)

    def from_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Convert a published state dict to one of ``model``."""
        return from_published(untied(state, self._model.language_model.head is None))

    @property
    def _model(self) -> TextToImageModel:
        return cast("TextToImageModel", self.model)

    def _check_rows(self, backend: Backend) -> None:
        """Raise unless the row pattern fits the rows of every process and micro-batch."""
        batch = self.config.training.global_batch_size
        parts = backend.process_count * self.config.training.grad_accum_steps
        period, count = self._settings.row_pattern
        if self._settings.read == "tokens" and (
            period != count or self._settings.images_per_row > 1
        ):
            raise UserError(
                "text_to_image.row_pattern and images_per_row: with read: tokens every row "
                "generates its only image: remove these keys"
            )
        if not 1 <= count <= period:
            raise UserError(
                f"text_to_image.row_pattern is {[period, count]}: expected (period, count) with a "
                "count of at least 1 and at most the period"
            )
        if batch is not None and batch % (parts * period):
            raise UserError(
                f"text_to_image.row_pattern has a period of {period}, which does not divide the "
                f"{batch // parts} rows of a micro-batch of a process: choose another "
                "training.global_batch_size"
            )


def _prompt_rows(
    config: RunConfig, settings: TextToImageConfig, data: CaptionedMixture, tokens: int
) -> PromptRows:
    """Return what makes the rows of a model that reads the tokens of prompts."""
    if settings.length <= settings.prompt.dropped_tokens:
        raise UserError(
            f"text_to_image.prompt.dropped_tokens is {settings.prompt.dropped_tokens}, all of the "
            f"{settings.length} tokens of a prompt (text_to_image.length): write fewer"
        )
    captions = settings.captions
    rows = PromptRows(
        data.text_tables(),
        tokenizer_folder(settings),
        tokens,
        settings.length,
        config.training.global_seed,
        CaptionChoice(captions.sources, captions.weights, captions.max_chars),
        RowFormat(captions.prompts),
        dropout=settings.head.condition_dropout_prob,
    )
    _ = rows.rows  # raises here rather than in a worker
    return rows


def _latent_tokens(config: RunConfig) -> int:
    size = config.misc.latent_size
    if size is None:
        raise UserError("misc.latent_size is unknown: set it to the C, H, W of the encoder")
    return math.prod(size[1:])
