"""The train step of stage 1: a decoder update followed by discriminator updates.

The decoder minimises L1, LPIPS and a GAN loss (RAE, section 3): the recipe of VQGAN (Esser et al.
2021) with a projected DINO discriminator (Sauer et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.checkpoint.train_state import TrainState
from rae_xla.models.diffaug import diff_augment
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.gan_losses import DISCRIMINATOR_LOSSES, adaptive_weight, vanilla_g
from rae_xla.models.lpips import LPIPS
from rae_xla.models.rae import RAE
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import to_unit
from rae_xla.train.ema import update_ema, update_power_averages
from rae_xla.train.muon import make_optimizer
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import (
    TrainStep,
    apply_gradients,
    clear_gradients,
    split_micro_batches,
)

if TYPE_CHECKING:
    from rae_xla.config import GanConfig, TrainingConfig

StepMetrics = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """The losses of a step in addition to L1. Each phase is one compiled graph.

    Attributes:
        lpips: the decoder minimises LPIPS.
        gan: the decoder minimises the GAN loss.
        disc: the discriminator is updated.
    """

    lpips: bool
    gan: bool
    disc: bool

    def __str__(self) -> str:
        named = {"L1": True, "LPIPS": self.lpips, "GAN": self.gan}
        losses = " + ".join(name for name, present in named.items() if present)
        return losses + (", with discriminator updates" if self.disc else "")


@dataclass(frozen=True)
class Networks:
    """The modules of stage 1, on the devices; None for those that no phase needs."""

    rae: RAE
    lpips: LPIPS | None
    disc: DinoDiscriminator | None


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch and its random numbers.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        tokens: encoder tokens (B, N, C) without noise.
        draws: random numbers of its rows.
    """

    images: Tensor
    tokens: Tensor
    draws: CounterRNG


def make_gan_step(
    networks: Networks,
    state: TrainState,
    phase: Phase,
    training: TrainingConfig,
    gan: GanConfig,
    backend: Backend,
) -> TrainStep:
    """Build the step of a phase: the decoder update, then the discriminator updates.

    The discriminator is given reconstructions by the updated decoder, without latent noise, clamped
    and rounded to 8 bits as the real images are. With ``grad_accum_steps`` every micro-batch has
    its own adaptive weight.

    The batch carries ``lr`` and, if the discriminator is updated, the learning rate of each of its
    updates (``disc_lr_name``) and ``disc_count``, the number of earlier updates; all 0-d.
    """
    decoder = _DecoderUpdate(networks, state, phase, training, gan, backend)
    discriminator = _DiscriminatorUpdate(networks, state, training, gan, backend)

    def step(batch: Batch) -> StepMetrics:
        micro_batches = []
        for rows in split_micro_batches(batch, training.grad_accum_steps):
            images = to_unit(rows["image"])
            with backend.autocast():
                tokens = networks.rae.encode_tokens(images)
            draws = CounterRNG(training.global_seed, rows["step"], rows["row"])
            micro_batches.append(_MicroBatch(images, tokens, draws))
        metrics = decoder(micro_batches, batch)
        updates = [
            discriminator(micro_batches, batch, number)
            for number in range(gan.loss.disc_updates if phase.disc else 0)
        ]
        for name in updates[0] if updates else ():
            metrics[name] = torch.stack([update[name] for update in updates]).mean(0)
        return metrics

    return TrainStep(step)


def disc_lr_name(number: int) -> str:
    """Return the name of the learning rate of a step's discriminator update ``number``."""
    return f"disc_lr_{number}" if number else "disc_lr"


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Set a module to train or eval mode within the context."""
    before = module.training
    module.train(training)
    yield
    module.train(before)


def _to_signed(images: Tensor) -> Tensor:
    """Map [0, 1] to [-1, 1], the range that LPIPS and the discriminator expect."""
    return images * 2 - 1


def _to_8_bits(images: Tensor) -> Tensor:
    """Clamp images in [-1, 1] and round them to the nearest 8-bit values."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@dataclass(frozen=True)
class _DecoderUpdate:
    networks: Networks
    state: TrainState
    phase: Phase
    training: TrainingConfig
    gan: GanConfig
    backend: Backend

    def __call__(self, micro_batches: list[_MicroBatch], batch: Batch) -> StepMetrics:
        trained, training = self.state.model, self.training
        clear_gradients(trained)
        shares = []
        for micro_batch in micro_batches:
            with _mode(self.networks.rae.decoder, training=True):
                shares.append(self._backward(micro_batch, 1 / len(micro_batches)))
        metrics = _averaged(shares, self.backend)
        metrics["train/grad_norm"], metrics["train/skipped"] = apply_gradients(
            trained,
            make_optimizer(training),
            metrics["train/loss"],
            batch["lr"],
            batch["step"],
            self.backend,
            training.clip_grad,
            skip_norm=training.skip_grad_norm,
        )
        update_ema(self.state.ema, trained.module, training.ema_decay, self.backend.local_shards)
        update_power_averages(self.state, batch["step"], self.backend)
        return metrics

    def _backward(self, micro_batch: _MicroBatch, share: float) -> StepMetrics:
        """Accumulate the decoder's gradient of a micro-batch; returns its metrics.

        The gradients of both losses are computed with respect to the image first. Their gradients
        with respect to the last layer, which the adaptive weight compares, follow from those by one
        small matrix product, and their weighted sum is backpropagated through the decoder once. So
        the backward pass of no network runs twice.
        """
        reconstructed, last_inputs = self._reconstruct(micro_batch)
        image = reconstructed.detach().requires_grad_()
        metrics = {"train/l1": (image - micro_batch.images).abs().mean()}
        total = metrics["train/l1"]
        if self.phase.lpips:
            assert self.networks.lpips is not None
            with self.backend.autocast():
                distances = self.networks.lpips(_to_signed(micro_batch.images), _to_signed(image))
            metrics["train/lpips"] = distances.mean()
            total = total + self.gan.loss.perceptual_weight * metrics["train/lpips"]
        [gradient] = torch.autograd.grad(total, image)
        if self.phase.gan:
            loss = self._adversarial_loss(image, micro_batch)
            [gan_gradient] = torch.autograd.grad(loss, image)
            at_last, gan_at_last = self._at_last_layer(last_inputs, (gradient, gan_gradient))
            weight = adaptive_weight(at_last, gan_at_last, self.gan.loss.max_d_weight)
            factor = self.gan.loss.disc_weight * weight
            gradient = gradient + factor * gan_gradient
            total = total + factor * loss
            metrics |= {"train/gan": loss, "train/adaptive_weight": weight}
        reconstructed.backward(gradient * share)
        return {"train/loss": total.detach()} | {k: v.detach() for k, v in metrics.items()}

    def _reconstruct(self, micro_batch: _MicroBatch) -> tuple[Tensor, Tensor]:
        """Reconstruct from noised latents.

        Returns:
            Images (B, 3, H, W) float32, and the inputs of the decoder's last layer (B, 1 + N,
            width).
        """
        rae, tokens = self.networks.rae, micro_batch.tokens
        inputs_of_last: list[Tensor] = []
        hook = rae.decoder.decoder_pred.register_forward_pre_hook(
            lambda _, inputs: inputs_of_last.append(inputs[0].detach())
        )
        with self.backend.autocast():
            if rae.noise_tau > 0:
                noise = micro_batch.draws.normal("latent noise", tuple(tokens.shape[1:]))
                tokens = rae.add_noise(tokens, (micro_batch.draws.uniform("noise level"), noise))
            reconstructed = rae.decode(rae.to_latents(tokens)).float()
        hook.remove()
        return reconstructed, inputs_of_last[0]

    def _at_last_layer(self, inputs: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Convert gradients with respect to the image to ones with respect to the last weight.

        They are averaged over the global batch. They depend on the inputs of the layer but not on
        the value of its weight, of which a process may hold only a shard: a zero weight serves.
        """
        rae, layer = self.networks.rae, self.networks.rae.decoder.decoder_pred
        weight = torch.zeros(
            layer.out_features, layer.in_features, device=inputs.device, requires_grad=True
        )
        with self.backend.autocast():
            patches = F.linear(inputs, weight)[:, 1:]
            image = (rae.decoder.unpatchify(patches) * rae.encoder_std).float()
        return self.backend.global_mean(
            [torch.autograd.grad(image, weight, g, retain_graph=True)[0] for g in gradients]
        )

    def _adversarial_loss(self, image: Tensor, micro_batch: _MicroBatch) -> Tensor:
        disc = self.networks.disc
        assert disc is not None
        augmented = augment(_to_signed(image), micro_batch.draws, "augment for decoder", self.gan)
        with _mode(disc, training=False), self.backend.autocast():
            return vanilla_g(disc(augmented))


@dataclass(frozen=True)
class _DiscriminatorUpdate:
    networks: Networks
    state: TrainState
    training: TrainingConfig
    gan: GanConfig
    backend: Backend

    def __call__(self, micro_batches: list[_MicroBatch], batch: Batch, number: int) -> StepMetrics:
        trained = self.state.disc
        assert trained is not None
        clear_gradients(trained)
        shares = [
            self._backward(micro_batch, number, 1 / len(micro_batches))
            for micro_batch in micro_batches
        ]
        metrics = _averaged(shares, self.backend)
        metrics["train/disc/grad_norm"], metrics["train/disc/skipped"] = apply_gradients(
            trained,
            AdamW.from_config(self.gan.disc.optimizer),
            metrics["train/disc/loss"],
            batch[disc_lr_name(number)],
            batch["disc_count"] + number,
            self.backend,
        )
        return metrics

    def _backward(self, micro_batch: _MicroBatch, number: int, share: float) -> StepMetrics:
        """Accumulate the discriminator's gradient of a micro-batch; returns its metrics."""
        fake = self._logits(
            _to_8_bits(_to_signed(self._reconstruct(micro_batch))), "fake", number, micro_batch
        )
        real = self._logits(_to_signed(micro_batch.images), "real", number, micro_batch)
        loss = DISCRIMINATOR_LOSSES[self.gan.loss.disc_loss](real, fake)
        (loss * share).backward()
        return {
            "train/disc/loss": loss.detach(),
            "train/disc/accuracy": (real > fake).float().mean(),
            "train/disc/logits_real": real.detach().mean(),
            "train/disc/logits_fake": fake.detach().mean(),
        }

    @torch.no_grad()
    def _reconstruct(self, micro_batch: _MicroBatch) -> Tensor:
        rae = self.networks.rae
        with _mode(rae.decoder, training=False), self.backend.autocast():
            return rae.decode(rae.to_latents(micro_batch.tokens)).float()

    def _logits(self, images: Tensor, kind: str, number: int, micro_batch: _MicroBatch) -> Tensor:
        """Return the logits of images (B, 3, H, W) in [-1, 1]; only the heads need gradients."""
        disc = self.networks.disc
        assert disc is not None
        augmented = augment(images, micro_batch.draws, f"augment {kind} {number}", self.gan)
        with _mode(disc, training=True), self.backend.autocast():
            with torch.no_grad():
                features = disc.features(augmented)
            # Not compiled by torch.compile: its backward pass reads the singular vectors from the
            # buffers, which the forward pass on the other images has updated by then.
            return torch.compiler.disable(disc.heads_forward)(features)


def _averaged(shares: Sequence[StepMetrics], backend: Backend) -> StepMetrics:
    """Return the metrics of the global batch, from those of this process's micro-batches."""
    means = {name: torch.stack([share[name] for share in shares]).mean(0) for name in shares[0]}
    return dict(zip(means, backend.global_mean(list(means.values())), strict=True))


def augment(images: Tensor, draws: CounterRNG, purpose: str, gan: GanConfig) -> Tensor:
    """Apply DiffAugment (Zhao et al. 2020) to images (B, 3, H, W).

    Args:
        images: differentiable.
        draws: random numbers of the images.
        purpose: gives each use its own random numbers.
        gan: with the augmentation's settings.
    """
    flags = draws.batch_uniform(f"{purpose}: whether", 3)
    amounts = draws.uniform(f"{purpose}: how much", (7,))
    settings = gan.disc.augment
    return diff_augment(images, flags, amounts, prob=settings.prob, cutout=settings.cutout)
