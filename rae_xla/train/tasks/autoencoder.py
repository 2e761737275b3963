"""Stage 1: train a ViT decoder to invert a frozen encoder (RAE, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import TrainState
from rae_xla.config import GanConfig, RunConfig
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.dino_vit import HUB_FILE, HUB_REPOSITORY, load_dino, resolve_recipe
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.lpips import load_lpips
from rae_xla.models.rae import RAE
from rae_xla.runtime import Backend
from rae_xla.sample.images import to_grid
from rae_xla.sample.reconstruct import make_reconstruct, with_decoder
from rae_xla.train.batches import first_images
from rae_xla.train.evaluators import ReconstructionEvaluator
from rae_xla.train.gan_step import Networks, Phase, disc_lr_name, make_gan_step
from rae_xla.train.schedules import make_schedule
from rae_xla.train.tasks.base import Preview, StateDict, Task
from rae_xla.train.train_step import TrainStep

PREVIEW_ROWS = ("input", "decoder", "average", "error x 4")


class AutoencoderTask(Task):
    """Train the decoder with L1, LPIPS and a GAN loss on reconstructions from noised latents.

    Raises:
        UserError: the decoder does not return images of ``data.image_size``, or a file that the
            losses need is missing.
    """

    weights_key = "stage_1.ckpt"
    crop = "random"

    def __init__(
        self, config: RunConfig, backend: Backend, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        super().__init__(config, backend, data, steps_per_epoch)
        if config.stage_1 is None:
            raise UserError(
                "stage 1 trains the decoder of the stage_1 section, which this configuration does "
                "not have: add it, or start from a file in configs/stage1"
            )
        if config.stage_2 is not None:
            raise UserError(
                "this configuration describes a diffusion transformer (it has a stage_2 section), "
                "but stage 1 trains a decoder: run `rae-xla train stage2`, or remove the section "
                "with stage_2=null"
            )
        self._gan = config.gan or GanConfig()
        self._rae = cast("RAE", instantiate(config.stage_1)).train()
        if self._rae.image_size != config.data.image_size:
            raise UserError(
                f"the decoder returns images of {self._rae.image_size} px, but data.image_size is "
                f"{config.data.image_size}, and the loss compares the two pixel by pixel: set "
                f"data.image_size={self._rae.image_size}, or change "
                "stage_1.params.decoder_patch_size"
            )
        self._phases = _PhaseSchedule(self._gan, steps_per_epoch)
        disc = self._gan.disc
        self._disc_schedule = make_schedule(disc.optimizer, disc.scheduler, steps_per_epoch)
        weights, loss = config.weights, self._gan.loss
        self._lpips = load_lpips(weights.vgg16, weights.lpips) if loss.perceptual_weight else None
        self._disc = make_discriminator(self._gan) if loss.disc_weight else None
        # No provenance: the checkpoint contains the encoder.
        self.model, self.disc = self._rae.decoder, self._disc
        self.frozen = nn.ModuleDict({"rae": self._rae})
        if self._lpips is not None:
            self.frozen["lpips"] = self._lpips
        if self._disc is not None:
            self.frozen["backbone"] = self._disc.backbone
        self._preview_images = torch.empty(0, 3, config.data.image_size, config.data.image_size)
        if data is not None:
            self._preview_images = first_images(
                data, config.training.num_samples, config.data.image_size
            )
        self._evaluate = None
        if config.eval is not None:
            self._evaluate = ReconstructionEvaluator(
                config, backend, self._rae.image_size, self._lpips
            )

    def phase(self, step: int) -> Hashable:
        """Return which losses are active at a step."""
        return self._phases.phase(step)

    def inputs(self, step: int) -> dict[str, Tensor]:
        """Return the learning rates, and the number of discriminator updates so far.

        The schedule of the discriminator counts the discriminator's own updates, so its warm-up
        starts when the discriminator does.
        """
        inputs = super().inputs(step)
        if self._phases.phase(step).disc:
            count = self._phases.disc_updates_before(step)
            inputs["disc_count"] = torch.tensor(count, dtype=torch.int32)
            for number in range(self._gan.loss.disc_updates):
                rate = self._disc_schedule(count + number)
                inputs[disc_lr_name(number)] = torch.tensor(rate, dtype=torch.float32)
        return inputs

    def make_step(
        self, phase: Hashable, state: TrainState, backend: Backend | None = None
    ) -> TrainStep:
        """Build the decoder update of a phase, followed by the discriminator's in later phases."""
        return make_gan_step(
            Networks(self._rae, self._lpips, self._disc),
            state,
            cast("Phase", phase),
            self.config.training,
            self._gan,
            backend or self.backend,
        )

    def to_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Return the complete RAE: the frozen encoder and this decoder."""
        return _with_prefix("encoder", self._rae.encoder.state_dict()) | _with_prefix(
            "decoder", state
        )

    def from_published_state_dict(self, state: StateDict) -> dict[str, Tensor]:
        """Return the decoder of a complete RAE."""
        prefix = "decoder."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def preview(self, state: TrainState) -> Preview:
        """Return the first training images, their reconstructions, and the absolute error.

        Reconstructions are by the decoder and by its moving average; the error is the latter's.
        """
        images = self._preview_images.permute(0, 2, 3, 1).numpy()
        reconstructed, averaged = (
            make_reconstruct(with_decoder(self._rae, decoder), self.backend)(self._preview_images)
            for decoder in (state.model.module, state.ema)
        )
        error = 4 * np.abs(images.astype(np.int32) - averaged.astype(np.int32))
        rows = [images, reconstructed, averaged, error.clip(max=255).astype(np.uint8)]
        grid = to_grid(np.concatenate(rows), columns=len(images), captions=PREVIEW_ROWS)
        return Preview(grid, f"rows: {', '.join(PREVIEW_ROWS)}")

    def evaluate(
        self, state: TrainState, on_progress: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Return reconstruction metrics of the averaged decoder.

        With ``eval.eval_model`` also those of the decoder itself. There is no lite evaluation:
        reconstructions are good from the first steps on.
        """
        if self._evaluate is None or lite:
            return {}
        decoders = {"eval": state.ema}
        if self.config.eval is not None and self.config.eval.eval_model:
            decoders["eval/model"] = state.model.module
        return {
            f"{prefix}/{name}": value
            for prefix, decoder in decoders.items()
            for name, value in self._evaluate(with_decoder(self._rae, decoder), on_progress).items()
        }


class _PhaseSchedule:
    """The steps at which the losses start."""

    def __init__(self, gan: GanConfig, steps_per_epoch: int) -> None:
        loss = gan.loss
        update_start = loss.disc_start if loss.disc_upd_start is None else loss.disc_upd_start
        self._lpips, self._gan, self._disc = (
            int(epoch * steps_per_epoch)
            for epoch in (loss.lpips_start, loss.disc_start, update_start)
        )
        self._loss = loss

    def phase(self, step: int) -> Phase:
        """Return the losses that are active at a step."""
        loss = self._loss
        return Phase(
            lpips=loss.perceptual_weight > 0 and step >= self._lpips,
            gan=loss.disc_weight > 0 and step >= self._gan,
            disc=loss.disc_weight > 0 and step >= self._disc,
        )

    def disc_updates_before(self, step: int) -> int:
        """Return how many discriminator updates precede a step."""
        return max(0, step - self._disc) * self._loss.disc_updates


def make_discriminator(gan: GanConfig) -> DinoDiscriminator:
    """Build a discriminator: a frozen backbone from its file, and newly initialised heads.

    Raises:
        UserError: no backbone file is configured, or a tapped block does not exist.
    """
    arch = gan.disc.arch
    if arch.dino_ckpt_path is None:
        raise UserError(
            "gan.disc.arch.dino_ckpt_path is not set, but the discriminator needs the file of its "
            f"backbone: run `hf download {HUB_REPOSITORY} {HUB_FILE} --local-dir models` and set "
            "the path, or train without a discriminator: gan.loss.disc_weight=0"
        )
    depth = resolve_recipe(arch.recipe).depth
    if arch.key_depths is not None and not all(0 <= key < depth for key in arch.key_depths):
        raise UserError(
            f"gan.disc.arch.key_depths {list(arch.key_depths)}: the backbone has blocks 0 to "
            f"{depth - 1}"
        )
    return DinoDiscriminator(
        # As published, the epsilon of the heads is that of the backbone.
        load_dino(arch.dino_ckpt_path, arch.recipe, norm_eps=arch.norm_eps),
        ks=arch.ks,
        key_depths=arch.key_depths,
        norm_type=arch.norm_type,
        using_spec_norm=arch.using_spec_norm,
        norm_eps=arch.norm_eps,
    )


def _with_prefix(name: str, state: StateDict) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for k, v in state.items()}
