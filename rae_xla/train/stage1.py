"""Stage 1: a decoder learns to undo the frozen encoder (RAE, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
from torch import Tensor, nn

from rae_xla.data.shards import ShardIndex
from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.pictures import Pixels, to_grid, to_unit
from rae_xla.sample.reconstruct import make_reconstruct, with_decoder
from rae_xla.train.batches import first_images
from rae_xla.train.stage import Stage, StateDict

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def make_stage1(config: RunConfig, runtime: Runtime, index: ShardIndex) -> Stage:
    """Build stage 1: L1 between an image and its reconstruction from noised latents.

    Raises:
        UserError: when the decoder does not return images of ``data.image_size``, or the
            configuration asks for losses that are not built yet.
    """
    if config.stage_1 is None:
        raise UserError("stage 1 trains the decoder of a stage_1 section, and there is none")
    _refuse_gan(config)
    rae = cast("RAE", instantiate(config.stage_1)).train()
    if rae.image_size != config.data.image_size:
        raise UserError(
            f"the decoder returns images of {rae.image_size} px but data.image_size is "
            f"{config.data.image_size}: the loss compares the two pixel by pixel. Set "
            f"data.image_size={rae.image_size} or another stage_1.params.decoder_patch_size"
        )
    count = min(config.training.num_samples, len(index))
    shown = first_images(index, count, config.data.image_size)

    def losses(batch: Batch, draws: Draws) -> Tensor:
        images = to_unit(batch["image"])
        noise = None
        if rae.noise_tau > 0:
            tokens = (rae.num_tokens, rae.latent_size[0])
            noise = draws.uniform("noise level"), draws.normal("latent noise", tokens)
        return l1(rae(images, noise), images)

    def publish(decoder: StateDict) -> dict[str, Tensor]:
        encoder = runtime.to_host(rae.encoder.state_dict())
        return _under("encoder", encoder) | _under("decoder", decoder)

    def unpublish(whole: StateDict) -> dict[str, Tensor]:
        start = "decoder."
        return {k.removeprefix(start): v for k, v in whole.items() if k.startswith(start)}

    def preview(decoder: nn.Module) -> Pixels:
        made = make_reconstruct(with_decoder(rae, decoder), runtime)(shown)
        real = shown.permute(0, 2, 3, 1).numpy()
        return to_grid(np.concatenate([real, made]), columns=count)

    return Stage("stage1", rae.decoder, rae, losses, publish, unpublish, preview)


def l1(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of each image: two of (B, 3, H, W) in [0, 1] to (B,)."""
    return (reconstruction.float() - images).abs().flatten(1).mean(1)


def _under(name: str, state: StateDict) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for k, v in state.items()}


def _refuse_gan(config: RunConfig) -> None:
    loss = config.gan.loss if config.gan is not None else None
    if loss is not None and (loss.disc_weight > 0 or loss.perceptual_weight > 0):
        raise UserError(
            "stage 1 trains with the L1 loss alone so far: LPIPS and the discriminator are not "
            "built yet. Set gan.loss.disc_weight=0 gan.loss.perceptual_weight=0 to train without"
        )
