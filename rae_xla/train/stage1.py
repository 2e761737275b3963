"""Stage 1: a decoder learns to undo the frozen encoder (RAE, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from rae_xla.config import GanConfig
from rae_xla.data.mixture import Mixture
from rae_xla.errors import UserError
from rae_xla.interop.manifest import Manifest
from rae_xla.models.dino_vit import HUB_FILE, HUB_REPOSITORY, load_dino, resolve_recipe
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.lpips import load_lpips
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Runtime
from rae_xla.sample.pictures import Pixels, to_grid
from rae_xla.sample.reconstruct import make_reconstruct, with_decoder
from rae_xla.train.batches import first_images
from rae_xla.train.evaluation import ReconstructionEvaluator
from rae_xla.train.gan_step import Networks, Phase, disc_rate, make_gan_step
from rae_xla.train.schedule import make_schedule
from rae_xla.train.stage import StateDict
from rae_xla.train.state import TrainState
from rae_xla.train.step import Step

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


ROWS = ("input", "decoder", "average", "error x 4")
"""Of a preview."""


class Stage1:
    """L1, LPIPS and a GAN between an image and its reconstruction from noised latents.

    See ``Stage``. Without data a stage can be planned: it has no images to show.

    Raises:
        UserError: when the decoder does not return images of ``data.image_size``, or a file that
            the losses need is missing.
    """

    def __init__(
        self, config: RunConfig, runtime: Runtime, data: Mixture | None, steps_per_epoch: int
    ) -> None:
        if config.stage_1 is None:
            raise UserError("stage 1 trains the decoder of a stage_1 section, and there is none")
        if config.stage_2 is not None:
            raise UserError(
                "this is the configuration of a diffusion transformer (it has a stage_2 section), "
                "and stage 1 trains a decoder: `rae-xla train stage2` is meant, or the "
                "configuration without that section (stage_2=null)"
            )
        self._config, self._runtime = config, runtime
        self._gan = config.gan or GanConfig()
        self._rae = cast("RAE", instantiate(config.stage_1)).train()
        if self._rae.image_size != config.data.image_size:
            raise UserError(
                f"the decoder returns images of {self._rae.image_size} px but data.image_size is "
                f"{config.data.image_size}: the loss compares the two pixel by pixel. Set "
                f"data.image_size={self._rae.image_size} or another "
                "stage_1.params.decoder_patch_size"
            )
        self._timetable = _Timetable(self._gan, steps_per_epoch)
        self._set_schedules(steps_per_epoch)
        weights, loss = config.weights, self._gan.loss
        self._lpips = load_lpips(weights.vgg16, weights.lpips) if loss.perceptual_weight else None
        self._disc = make_discriminator(self._gan) if loss.disc_weight else None
        self.model = self._rae.decoder
        self.ties = Manifest()  # a checkpoint has the encoder in it
        self.disc = self._disc
        self.frozen = nn.ModuleDict({"rae": self._rae})
        if self._lpips is not None:
            self.frozen["lpips"] = self._lpips
        if self._disc is not None:
            self.frozen["backbone"] = self._disc.backbone
        self._shown = torch.empty(0, 3, config.data.image_size, config.data.image_size)
        if data is not None:
            self._shown = first_images(data, config.training.num_samples, config.data.image_size)
        self._evaluate = None
        if config.eval is not None:
            self._evaluate = ReconstructionEvaluator(
                config, runtime, self._rae.image_size, self._lpips
            )

    @property
    def caption(self) -> str:
        """What a preview's rows are."""
        return f"rows: {', '.join(ROWS)}"

    def _set_schedules(self, steps_per_epoch: int) -> None:
        training, disc = self._config.training, self._gan.disc
        self._schedule = make_schedule(training.optimizer, training.scheduler, steps_per_epoch)
        self._disc_schedule = make_schedule(disc.optimizer, disc.scheduler, steps_per_epoch)

    def phase(self, step: int) -> Hashable:
        """Which losses have begun."""
        return self._timetable.phase(step)

    def inputs(self, step: int) -> dict[str, Tensor]:
        """Learning rates, and how often the discriminator was updated before.

        Its schedule counts its own updates, so its warm-up begins when it does.
        """
        inputs = {"lr": torch.tensor(self._schedule(step), dtype=torch.float32)}
        if self._timetable.phase(step).disc:
            count = self._timetable.disc_count(step)
            inputs["disc_count"] = torch.tensor(count, dtype=torch.int32)
            for number in range(self._gan.loss.disc_updates):
                rate = self._disc_schedule(count + number)
                inputs[disc_rate(number)] = torch.tensor(rate, dtype=torch.float32)
        return inputs

    def make_step(self, phase: Hashable, state: TrainState, runtime: Runtime | None = None) -> Step:
        """The decoder's update, and from its phase on the discriminator's."""
        return make_gan_step(
            Networks(self._rae, self._lpips, self._disc),
            state,
            cast("Phase", phase),
            self._config.training,
            self._gan,
            runtime or self._runtime,
        )

    def publish(self, state: StateDict) -> dict[str, Tensor]:
        """The whole RAE: the encoder as it always was, and this decoder."""
        return _under("encoder", self._rae.encoder.state_dict()) | _under("decoder", state)

    def unpublish(self, state: StateDict) -> dict[str, Tensor]:
        """The decoder's part."""
        start = "decoder."
        return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}

    def preview(self, state: TrainState) -> Pixels:
        """The first images, what the decoder makes of them, what its average does, and how far that
        is from them.
        """
        real = self._shown.permute(0, 2, 3, 1).numpy()
        made, averaged = (
            make_reconstruct(with_decoder(self._rae, decoder), self._runtime)(self._shown)
            for decoder in (state.model.module, state.ema)
        )
        difference = 4 * np.abs(real.astype(np.int32) - averaged.astype(np.int32))
        rows = [real, made, averaged, difference.clip(max=255).astype(np.uint8)]
        return to_grid(np.concatenate(rows), columns=len(real), captions=ROWS)

    def evaluate(
        self, state: TrainState, moved: Callable[[], None], *, lite: bool = False
    ) -> dict[str, float]:
        """Quality of the averaged decoder's reconstructions, and of the decoder's if asked for.
        There is no small evaluation: reconstructions are good from the first images on.
        """
        if self._evaluate is None or lite:
            return {}
        decoders = {"eval": state.ema}
        if self._config.eval is not None and self._config.eval.eval_model:
            decoders["eval/model"] = state.model.module
        return {
            f"{prefix}/{name}": value
            for prefix, decoder in decoders.items()
            for name, value in self._evaluate(with_decoder(self._rae, decoder), moved).items()
        }


class _Timetable:
    """When which loss begins, in steps."""

    def __init__(self, gan: GanConfig, steps_per_epoch: int) -> None:
        loss = gan.loss
        learns = loss.disc_start if loss.disc_upd_start is None else loss.disc_upd_start
        self._lpips, self._gan, self._disc = (
            int(epoch * steps_per_epoch) for epoch in (loss.lpips_start, loss.disc_start, learns)
        )
        self._loss = loss

    def phase(self, step: int) -> Phase:
        loss = self._loss
        return Phase(
            lpips=loss.perceptual_weight > 0 and step >= self._lpips,
            gan=loss.disc_weight > 0 and step >= self._gan,
            disc=loss.disc_weight > 0 and step >= self._disc,
        )

    def disc_count(self, step: int) -> int:
        """Updates of the discriminator before a step."""
        return max(0, step - self._disc) * self._loss.disc_updates


def make_discriminator(gan: GanConfig) -> DinoDiscriminator:
    """The discriminator of a configuration: frozen backbone from its file, fresh heads."""
    arch = gan.disc.arch
    if arch.dino_ckpt_path is None:
        raise UserError(
            "gan.disc.arch.dino_ckpt_path is missing: the file of the discriminator's backbone "
            f"(hf download {HUB_REPOSITORY} {HUB_FILE} --local-dir models); or train without a "
            "discriminator: gan.loss.disc_weight=0"
        )
    depth = resolve_recipe(arch.recipe).depth
    if arch.key_depths is not None and not all(0 <= key < depth for key in arch.key_depths):
        raise UserError(
            f"gan.disc.arch.key_depths {list(arch.key_depths)}: the backbone has the blocks 0 to "
            f"{depth - 1}"
        )
    return DinoDiscriminator(
        # as published, the heads' epsilon is the backbone's too
        load_dino(arch.dino_ckpt_path, arch.recipe, norm_eps=arch.norm_eps),
        ks=arch.ks,
        key_depths=arch.key_depths,
        norm_type=arch.norm_type,
        using_spec_norm=arch.using_spec_norm,
        norm_eps=arch.norm_eps,
    )


def _under(name: str, state: StateDict) -> dict[str, Tensor]:
    return {f"{name}.{k}": v for k, v in state.items()}
