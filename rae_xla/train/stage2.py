"""Stage 2: a diffusion transformer learns the latents (RAE, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.belonging import check_dit_file, made_in_latents_of
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.generate import ImageSampler, make_transport
from rae_xla.sample.pictures import Pixels, to_grid, to_unit
from rae_xla.train.adamw import AdamW
from rae_xla.train.evaluation import GenerationEvaluator
from rae_xla.train.schedule import make_schedule
from rae_xla.train.stage import StateDict
from rae_xla.train.state import TrainState
from rae_xla.train.step import Step, make_train_step

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


class Stage2:
    """Flow matching on the latents of a frozen RAE; see ``Stage``.

    Without data a stage can be planned: its labels are not checked.

    Raises:
        UserError: when a section is missing or the shards hold labels the model has no class for.
    """

    def __init__(
        self, config: RunConfig, runtime: Runtime, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        if config.stage_1 is None or config.stage_2 is None:
            raise UserError(
                "stage 2 needs both a stage_1 section (the RAE) and a stage_2 section (the "
                "diffusion transformer); with the first alone, `rae-xla train stage1` is meant"
            )
        if data is not None:
            data.check_labels(config.misc.num_classes)
        self._config, self._runtime = config, runtime
        training = config.training
        self._schedule = make_schedule(training.optimizer, training.scheduler, steps_per_epoch)
        self._transport = make_transport(config)
        self._label_dropout = float(config.stage_2.params.get("class_dropout_prob", 0.1))
        self.frozen = cast("RAE", instantiate(config.stage_1)).eval().requires_grad_(False)
        self.model = instantiate(config.stage_2).train()
        check_dit_file(config.stage_2.ckpt, self.frozen)
        self.ties = made_in_latents_of(self.frozen, config.stage_1.params)
        self.disc = None
        self._samplers: dict[nn.Module, ImageSampler] = {}
        self._evaluate = None
        if config.eval is not None:
            self._evaluate = GenerationEvaluator(config, runtime, self.frozen.image_size)

    def phase(self, step: int) -> Hashable:
        """Every step is of one kind."""
        return "flow matching"

    def inputs(self, step: int) -> dict[str, Tensor]:
        """The learning rate."""
        return {"lr": torch.tensor(self._schedule(step), dtype=torch.float32)}

    def make_step(self, phase: Hashable, state: TrainState, runtime: Runtime | None = None) -> Step:
        """Flow matching, AdamW, EMA."""
        training = self._config.training
        return make_train_step(
            self._losses,
            state,
            AdamW.of(training.optimizer),
            seed=training.global_seed,
            ema_decay=training.ema_decay,
            clip_grad=training.clip_grad,
            accumulate=training.grad_accum_steps,
            runtime=runtime or self._runtime,
            skip_norm=training.skip_grad_norm,
        )

    def _losses(self, batch: Batch, draws: Draws) -> Tensor:
        latents = self.frozen.encode(to_unit(batch["image"])).float()
        dropped = draws.uniform("label dropout") < self._label_dropout
        return self._transport.training_losses(
            self.model,
            latents,
            {"y": batch["label"], "label_drop": dropped},
            t=self._transport.sample_times(draws.uniform("time")),
            noise=draws.normal("noise", latents.shape[1:]),
        )["loss"]

    def publish(self, state: StateDict) -> dict[str, Tensor]:
        """As it is."""
        return dict(state)

    def unpublish(self, state: StateDict) -> dict[str, Tensor]:
        """As it is."""
        return dict(state)

    @property
    def caption(self) -> str:
        """What a preview shows."""
        shown, classes = self._config.training.num_samples, self._config.misc.num_classes
        return f"averaged weights, no guidance, classes 0 to {min(shown, classes) - 1} in turn"

    def preview(self, state: TrainState) -> Pixels:
        """Samples of the averaged model, without guidance: what the model itself has learned."""
        config = self._config
        count = config.training.num_samples
        labels = torch.arange(count) % config.misc.num_classes
        rows = torch.arange(count, dtype=torch.int32)
        sampler = self._sampler(state.ema)
        return to_grid(sampler(config.training.global_seed, rows, labels), columns=count)

    def evaluate(
        self, state: TrainState, moved: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Quality of the averaged model's samples, and of the model's own if asked for."""
        if self._evaluate is None:
            return {}
        models = {"eval": state.ema}
        if self._config.eval is not None and self._config.eval.eval_model:
            models["eval/model"] = state.model.module
        figures: dict[str, float] = {}
        for prefix, model in models.items():
            training = model.training
            found = self._evaluate(self._sampler(model), moved, lite=lite)
            model.train(training)  # the sampler draws in eval mode
            figures |= {f"{prefix}/{name}": value for name, value in found.items()}
        return figures

    def _sampler(self, model: nn.Module) -> ImageSampler:
        """Without guidance; made once for a model, as it keeps what it has compiled."""
        if model not in self._samplers:
            plain = replace(self._config, guidance=replace(self._config.guidance, scale=1.0))
            self._samplers[model] = ImageSampler(plain, self._runtime, self.frozen, model)
        return self._samplers[model]
