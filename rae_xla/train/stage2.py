"""Stage 2: a diffusion transformer learns the latents (RAE, section 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rae_xla.data.shards import ShardIndex
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.generate import ImageSampler, make_transport
from rae_xla.sample.pictures import Pixels, to_grid, to_unit
from rae_xla.train.stage import Stage

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def make_stage2(config: RunConfig, runtime: Runtime, index: ShardIndex) -> Stage:
    """Build stage 2: flow matching on the latents of a frozen RAE.

    Raises:
        UserError: when a section is missing or the shards hold labels the model has no class for.
    """
    if config.stage_1 is None or config.stage_2 is None:
        raise UserError("stage 2 needs both a stage_1 section (the RAE) and a stage_2 section")
    index.check_labels(config.misc.num_classes)
    rae = cast("RAE", instantiate(config.stage_1)).eval().requires_grad_(False)
    model = instantiate(config.stage_2).train()
    transport = make_transport(config)
    dropout = float(config.stage_2.params.get("class_dropout_prob", 0.1))

    def losses(batch: Batch, draws: Draws) -> Tensor:
        latents = rae.encode(to_unit(batch["image"])).float()
        labels = {"y": batch["label"], "label_drop": draws.uniform("label dropout") < dropout}
        return transport.training_losses(
            model,
            latents,
            labels,
            t=transport.sample_times(draws.uniform("time")),
            noise=draws.normal("noise", latents.shape[1:]),
        )["loss"]

    count = config.training.num_samples
    # the previews show what the model has learned, so they are drawn without guidance
    plain = replace(config, guidance=replace(config.guidance, scale=1.0))

    def preview(ema: nn.Module) -> Pixels:
        labels = torch.arange(count) % config.misc.num_classes
        rows = torch.arange(count, dtype=torch.int32)
        sampler = ImageSampler(plain, runtime, rae, ema)
        return to_grid(sampler(config.training.global_seed, rows, labels), columns=count)

    return Stage("stage2", model, rae, losses, dict, dict, preview)
