"""A stage-1 step: the decoder learns from L1, LPIPS and a discriminator, and the discriminator from
the decoder (RAE, section 3; the recipe of VQGAN, Esser et al. 2021, with a projected DINO
discriminator, Sauer et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.models.diffaug import diff_augment
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.gan_losses import DISCRIMINATOR_LOSSES, adaptive_weight, vanilla_g
from rae_xla.models.lpips import LPIPS
from rae_xla.models.rae import RAE
from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.pictures import to_unit
from rae_xla.train.adamw import AdamW
from rae_xla.train.state import TrainState, update_ema
from rae_xla.train.step import Step, apply_gradients, clear_gradients, split_batch

if TYPE_CHECKING:
    from rae_xla.config import GanConfig, TrainingConfig

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """What a step has beside L1. Each phase is one compiled graph.

    Attributes:
        lpips: the decoder learns from LPIPS.
        gan: the decoder learns from the discriminator.
        disc: the discriminator learns.
    """

    lpips: bool
    gan: bool
    disc: bool

    def __str__(self) -> str:
        named = {"L1": True, "LPIPS": self.lpips, "GAN": self.gan}
        losses = " + ".join(name for name, present in named.items() if present)
        return losses + (", and the discriminator learns" if self.disc else "")


@dataclass(frozen=True)
class Networks:
    """The modules of stage 1, on the devices; those that no phase needs are None."""

    rae: RAE
    lpips: LPIPS | None
    disc: DinoDiscriminator | None


@dataclass(frozen=True)
class _Part:
    """The share of a batch that is worked through at a time: images (B, 3, H, W) in [0, 1], the
    encoder's tokens (B, N, C) without noise, and the draws of its rows.
    """

    images: Tensor
    tokens: Tensor
    draws: Draws


def make_gan_step(
    networks: Networks,
    state: TrainState,
    phase: Phase,
    training: TrainingConfig,
    gan: GanConfig,
    runtime: Runtime,
) -> Step:
    """Build the step of a phase: first the decoder's update, then the discriminator's.

    The discriminator sees reconstructions by the updated decoder, without latent noise, clamped and
    rounded to 8 bits as the real images are. With ``grad_accum_steps`` the adaptive weight is each
    part's own.

    The step's batch carries ``lr`` and, where the discriminator learns, the rate of each of its
    updates (``disc_rate``) and ``disc_count``, how many came before; all 0-d.
    """
    decoder = _DecoderUpdate(networks, state, phase, training, gan, runtime)
    discriminator = _DiscriminatorUpdate(networks, state, training, gan, runtime)

    def step(batch: Batch) -> Figures:
        parts = []
        for rows in split_batch(batch, training.grad_accum_steps):
            images = to_unit(rows["image"])
            with runtime.autocast():
                tokens = networks.rae.encode_tokens(images)
            draws = Draws(training.global_seed, rows["step"], rows["row"])
            parts.append(_Part(images, tokens, draws))
        figures = decoder(parts, batch)
        updates = [
            discriminator(parts, batch, number)
            for number in range(gan.loss.disc_updates if phase.disc else 0)
        ]
        for name in updates[0] if updates else ():
            figures[name] = torch.stack([update[name] for update in updates]).mean(0)
        return figures

    return Step(step)


def disc_rate(number: int) -> str:
    """What the learning rate of the discriminator's update ``number`` of a step is called."""
    return f"disc_lr_{number}" if number else "disc_lr"


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """A module in train or eval mode, for a while."""
    before = module.training
    module.train(training)
    yield
    module.train(before)


def _to_signed(images: Tensor) -> Tensor:
    """[0, 1] to [-1, 1], which LPIPS and the discriminator take."""
    return images * 2 - 1


def _to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to the nearest values that a picture file can hold."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@dataclass(frozen=True)
class _DecoderUpdate:
    networks: Networks
    state: TrainState
    phase: Phase
    training: TrainingConfig
    gan: GanConfig
    runtime: Runtime

    def __call__(self, parts: list[_Part], batch: Batch) -> Figures:
        trained, training = self.state.model, self.training
        clear_gradients(trained)
        shares = []
        for part in parts:
            with _mode(self.networks.rae.decoder, training=True):
                shares.append(self._backward(part, 1 / len(parts)))
        figures = _averaged(shares, self.runtime)
        figures["train/grad_norm"], figures["train/skipped"] = apply_gradients(
            trained,
            AdamW.of(training.optimizer),
            figures["train/loss"],
            batch["lr"],
            batch["step"],
            self.runtime,
            training.clip_grad,
            skip_norm=training.skip_grad_norm,
        )
        update_ema(self.state.ema, trained.module, training.ema_decay, self.runtime.parts)
        return figures

    def _backward(self, part: _Part, share: float) -> Figures:
        """Add a part's gradient to the decoder's.

        The losses' gradients are taken with respect to the image first. What they are with respect
        to the last layer, which the adaptive weight compares, is one small product from there, and
        their weighted sum goes back through the decoder once: no network is walked back twice.
        """
        made, before_last = self._reconstruct(part)
        image = made.detach().requires_grad_()
        figures = {"train/l1": (image - part.images).abs().mean()}
        total = figures["train/l1"]
        if self.phase.lpips:
            assert self.networks.lpips is not None
            with self.runtime.autocast():
                distances = self.networks.lpips(_to_signed(part.images), _to_signed(image))
            figures["train/lpips"] = distances.mean()
            total = total + self.gan.loss.perceptual_weight * figures["train/lpips"]
        [gradient] = torch.autograd.grad(total, image)
        if self.phase.gan:
            loss = self._adversarial_loss(image, part)
            [theirs] = torch.autograd.grad(loss, image)
            at_last, theirs_at_last = self._at_last_layer(before_last, (gradient, theirs))
            weight = adaptive_weight(at_last, theirs_at_last, self.gan.loss.max_d_weight)
            factor = self.gan.loss.disc_weight * weight
            gradient = gradient + factor * theirs
            total = total + factor * loss
            figures |= {"train/gan": loss, "train/adaptive_weight": weight}
        made.backward(gradient * share)
        return {"train/loss": total.detach()} | {k: v.detach() for k, v in figures.items()}

    def _reconstruct(self, part: _Part) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, H, W), in float32, from noised latents; and what the decoder's
        last layer made them of, (B, 1 + N, width).
        """
        rae, tokens = self.networks.rae, part.tokens
        given: list[Tensor] = []
        hook = rae.decoder.decoder_pred.register_forward_pre_hook(
            lambda _, inputs: given.append(inputs[0].detach())
        )
        with self.runtime.autocast():
            if rae.noise_tau > 0:
                noise = part.draws.normal("latent noise", tuple(tokens.shape[1:]))
                tokens = rae.add_noise(tokens, (part.draws.uniform("noise level"), noise))
            made = rae.decode(rae.to_latents(tokens)).float()
        hook.remove()
        return made, given[0]

    def _at_last_layer(self, inputs: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients with respect to the decoder's last weight, over the global batch, of what has
        these gradients with respect to the image.

        What the layer was given decides them; its weight, of which a process may hold a part, does
        not: any other would give the same.
        """
        rae, layer = self.networks.rae, self.networks.rae.decoder.decoder_pred
        weight = torch.zeros(
            layer.out_features, layer.in_features, device=inputs.device, requires_grad=True
        )
        with self.runtime.autocast():
            patches = F.linear(inputs, weight)[:, 1:]
            image = (rae.decoder.unpatchify(patches) * rae.encoder_std).float()
        return self.runtime.average(
            [torch.autograd.grad(image, weight, g, retain_graph=True)[0] for g in gradients]
        )

    def _adversarial_loss(self, image: Tensor, part: _Part) -> Tensor:
        disc = self.networks.disc
        assert disc is not None
        shown = augment(_to_signed(image), part.draws, "augment for decoder", self.gan)
        with _mode(disc, training=False), self.runtime.autocast():
            return vanilla_g(disc(shown))


@dataclass(frozen=True)
class _DiscriminatorUpdate:
    networks: Networks
    state: TrainState
    training: TrainingConfig
    gan: GanConfig
    runtime: Runtime

    def __call__(self, parts: list[_Part], batch: Batch, number: int) -> Figures:
        trained = self.state.disc
        assert trained is not None
        clear_gradients(trained)
        shares = [self._backward(part, number, 1 / len(parts)) for part in parts]
        figures = _averaged(shares, self.runtime)
        figures["train/disc/grad_norm"], figures["train/disc/skipped"] = apply_gradients(
            trained,
            AdamW.of(self.gan.disc.optimizer),
            figures["train/disc/loss"],
            batch[disc_rate(number)],
            batch["disc_count"] + number,
            self.runtime,
        )
        return figures

    def _backward(self, part: _Part, number: int, share: float) -> Figures:
        """Add a part's gradient to the discriminator's."""
        fake = self._logits(_to_8_bits(_to_signed(self._reconstruct(part))), "fake", number, part)
        real = self._logits(_to_signed(part.images), "real", number, part)
        loss = DISCRIMINATOR_LOSSES[self.gan.loss.disc_loss](real, fake)
        (loss * share).backward()
        return {
            "train/disc/loss": loss.detach(),
            "train/disc/accuracy": (real > fake).float().mean(),
            "train/disc/logits_real": real.detach().mean(),
            "train/disc/logits_fake": fake.detach().mean(),
        }

    @torch.no_grad()
    def _reconstruct(self, part: _Part) -> Tensor:
        rae = self.networks.rae
        with _mode(rae.decoder, training=False), self.runtime.autocast():
            return rae.decode(rae.to_latents(part.tokens)).float()

    def _logits(self, images: Tensor, kind: str, number: int, part: _Part) -> Tensor:
        """Logits of images (B, 3, H, W) in [-1, 1]. Only the heads are walked back."""
        disc = self.networks.disc
        assert disc is not None
        shown = augment(images, part.draws, f"augment {kind} {number}", self.gan)
        with _mode(disc, training=True), self.runtime.autocast():
            with torch.no_grad():
                features = disc.features(shown)
            # Not by torch.compile: its backward takes the singular vectors from the buffers, which
            # the forward of the other kind of images has advanced by then.
            return torch.compiler.disable(disc.heads_forward)(features)


def _averaged(shares: Sequence[Figures], runtime: Runtime) -> Figures:
    """Figures of the parts of a batch: their means over it."""
    means = {name: torch.stack([share[name] for share in shares]).mean(0) for name in shares[0]}
    return dict(zip(means, runtime.average(list(means.values())), strict=True))


def augment(images: Tensor, draws: Draws, purpose: str, gan: GanConfig) -> Tensor:
    """DiffAug (Zhao et al. 2020) of images (B, 3, H, W), with draws of its own for each purpose."""
    flags = draws.once(f"{purpose}: whether", 3)
    amounts = draws.uniform(f"{purpose}: how much", (7,))
    settings = gan.disc.augment
    return diff_augment(images, flags, amounts, prob=settings.prob, cutout=settings.cutout)
