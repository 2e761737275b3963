"""Stage 2: train a diffusion transformer on the latents of a frozen RAE (RAE, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.provenance import check_dit_file, latent_provenance
from rae_xla.checkpoint.train_state import TrainState
from rae_xla.config import GuidanceConfig, RunConfig
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.encoders.build import PreprocessedEncoder, build_preprocessed
from rae_xla.models.rae import RAE
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import to_grid, to_unit
from rae_xla.sample.sampler import ImageSampler, make_transport
from rae_xla.train.evaluators import GenerationEvaluator
from rae_xla.train.tasks.base import LossTask, Preview
from rae_xla.transport.losses import alignment_loss


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
        self._target = self._target_encoder()
        if self._target is not None:
            self.frozen = nn.ModuleList([self._rae, self._target])
        heads = ("base_model_depth", "repa_layer_depth")
        self._has_heads = any(getattr(self.model, name, None) is not None for name in heads)
        check_dit_file(config.stage_2.ckpt, self._rae)
        self.provenance = latent_provenance(self._rae, config.stage_1.params)
        self._samplers: dict[nn.Module, ImageSampler] = {}
        self._evaluate = None
        if config.eval is not None:
            self._evaluate = GenerationEvaluator(config, backend, self._rae.image_size)

    def _target_encoder(self) -> PreprocessedEncoder | None:
        """Build the encoder that REPA aligns with; None without REPA."""
        repa = self.config.repa
        if repa is None:
            return None
        encoder = build_preprocessed(
            repa.encoder_cls,
            repa.encoder_config_path,
            repa.encoder_input_size,
            repa.encoder_params,
        )
        model: Any = self.model
        tokens = (self._rae.num_tokens, model.repa_projector.out_features)
        found = (encoder.num_tokens, encoder.encoder.hidden_size)
        if found != tokens:
            raise UserError(
                f"repa: the encoder {repa.encoder_config_path} has {found[0]} tokens of {found[1]} "
                f"channels, but the model aligns {tokens[0]} tokens with {tokens[1]} channels: "
                "choose repa.encoder_input_size and stage_2.params.z_dim accordingly"
            )
        return encoder.eval().requires_grad_(False)

    def phase(self, step: int) -> Hashable:
        """Return the only phase."""
        return "flow matching"

    def loss(self, batch: Batch, draws: CounterRNG) -> Tensor:
        """Return the flow matching loss of every sample, (B,), with those of further heads."""
        latents = self._rae.encode(to_unit(batch["image"])).float()
        for_dropout, for_time = draws.uniforms("label dropout", "time")
        labels = {"y": batch["label"], "label_drop": for_dropout < self._label_dropout}
        t = self._transport.sample_times(for_time)
        noise = draws.normal("noise", latents.shape[1:])
        if not self._has_heads:
            return self._transport.training_losses(self.model, latents, labels, t=t, noise=noise)[
                "loss"
            ]
        noisy = self._transport.interpolate(latents, noise, t)
        outputs = self.model(noisy, t, **labels, all_outputs=True)
        loss = self._transport.output_loss(outputs.full, latents, noise, t)
        if outputs.base is not None:
            weight = self.config.internal_guidance.base_model_coeff
            loss = loss + weight * self._transport.output_loss(outputs.base, latents, noise, t)
        if self._target is not None and self.config.repa is not None:
            features = self._target(to_unit(batch["image"]))
            loss = loss + self.config.repa.coeff * alignment_loss(outputs.repa, features)
        return loss

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
            config = replace(self.config, guidance=GuidanceConfig())
            self._samplers[model] = ImageSampler(config, self.backend, self._rae, model)
        return self._samplers[model]
