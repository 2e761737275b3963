"""Stage 2: train a diffusion transformer on the latents of a frozen RAE (RAE, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.provenance import check_dit_file, latent_provenance
from rae_xla.checkpoint.train_state import TrainState
from rae_xla.config import RunConfig
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.rae import RAE
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import to_grid, to_unit
from rae_xla.sample.sampler import ImageSampler, make_transport
from rae_xla.train.evaluators import GenerationEvaluator
from rae_xla.train.tasks.base import LossTask, Preview


class DiffusionTask(LossTask):
    """Train a class-conditional model by flow matching on the latents of a frozen RAE.

    Raises:
        UserError: a section is missing, or the shards have labels that the model has no class for.
    """

    weights_key = "stage_2.ckpt"
    flip = True

    def __init__(
        self, config: RunConfig, backend: Backend, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        super().__init__(config, backend, data, steps_per_epoch)
        if config.stage_1 is None or config.stage_2 is None:
            raise UserError(
                "stage 2 needs a stage_1 section (the RAE) and a stage_2 section (the diffusion "
                "transformer), and this configuration does not have both: add the missing one, or "
                "train the decoder alone with `rae-xla train stage1`"
            )
        if data is not None:
            data.check_labels(config.misc.num_classes)
        self._transport = make_transport(config)
        self._label_dropout = float(config.stage_2.params.get("class_dropout_prob", 0.1))
        self._rae = cast("RAE", instantiate(config.stage_1)).eval().requires_grad_(False)
        self.frozen = self._rae
        self.model = instantiate(config.stage_2).train()
        check_dit_file(config.stage_2.ckpt, self._rae)
        self.provenance = latent_provenance(self._rae, config.stage_1.params)
        self._samplers: dict[nn.Module, ImageSampler] = {}
        self._evaluate = None
        if config.eval is not None:
            self._evaluate = GenerationEvaluator(config, backend, self._rae.image_size)

    def phase(self, step: int) -> Hashable:
        """Return the only phase."""
        return "flow matching"

    def loss(self, batch: Batch, draws: CounterRNG) -> Tensor:
        """Return the flow matching loss of every sample, (B,)."""
        latents = self._rae.encode(to_unit(batch["image"])).float()
        dropped = draws.uniform("label dropout") < self._label_dropout
        return self._transport.training_losses(
            self.model,
            latents,
            {"y": batch["label"], "label_drop": dropped},
            t=self._transport.sample_times(draws.uniform("time")),
            noise=draws.normal("noise", latents.shape[1:]),
        )["loss"]

    def preview(self, state: TrainState) -> Preview:
        """Return samples of the averaged model without guidance, one class after another."""
        config = self.config
        count, classes = config.training.num_samples, config.misc.num_classes
        labels = torch.arange(count) % classes
        rows = torch.arange(count, dtype=torch.int32)
        images = self._sampler(state.ema)(config.training.global_seed, rows, labels)
        last = min(count, classes) - 1
        return Preview(
            to_grid(images, columns=count), f"averaged weights, no guidance, classes 0 to {last}"
        )

    def evaluate(
        self, state: TrainState, on_progress: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Return metrics of samples of the averaged model.

        With ``eval.eval_model`` also those of the model itself.
        """
        if self._evaluate is None:
            return {}
        models = {"eval": state.ema}
        if self.config.eval is not None and self.config.eval.eval_model:
            models["eval/model"] = state.model.module
        metrics: dict[str, float] = {}
        for prefix, model in models.items():
            training = model.training
            found = self._evaluate(self._sampler(model), on_progress, lite=lite)
            model.train(training)  # the sampler switches to eval mode
            metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
        return metrics

    def _sampler(self, model: nn.Module) -> ImageSampler:
        """Return a sampler without guidance; cached, since it keeps its compiled functions."""
        if model not in self._samplers:
            config = replace(self.config, guidance=replace(self.config.guidance, scale=1.0))
            self._samplers[model] = ImageSampler(config, self.backend, self._rae, model)
        return self._samplers[model]
