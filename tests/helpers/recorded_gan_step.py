"""The recorded stage-1 step of the reference (``golden/train/stage1_one_step``)."""

from __future__ import annotations

import torch
from gan_cases import build_discriminator, build_lpips
from golden_case import load_case
from rae_cases import build_rae

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import load_config
from rae_xla.train import gan_step
from rae_xla.train.gan_step import Networks, Phase, make_gan_step

CASE = load_case("train/stage1_one_step")
EVERYTHING = Phase(lpips=True, gan=True, disc=True)
_DRAWS = {"augment for decoder": "g", "augment fake 0": "d_fake", "augment real 0": "d_real"}


class Recorded:
    """The random numbers of the recorded step; replaces ``CounterRNG``."""

    def __init__(self, seed, step, rows):
        self.device = rows.device

    def _get(self, name):
        return CASE[f"in.{name}"].to(self.device)

    def uniform(self, purpose, shape=()):
        if purpose == "noise level":
            return self._get("noise_uniform").reshape(3)
        return self._get(f"{_DRAWS[purpose.split(':')[0]]}_rand7").reshape(7, 3).T

    def normal(self, purpose, shape):
        return self._get("noise_normal")

    def batch_uniform(self, purpose, count):
        return self._get(f"{_DRAWS[purpose.split(':')[0]]}_rand3")


def settings(*overrides):
    """Return the configuration of the recorded step."""
    meta = CASE.meta
    return load_config(
        None,
        [
            f"training.clip_grad={meta['clip_grad']}",
            f"training.ema_decay={meta['ema_decay']}",
            f"gan.loss.disc_weight={meta['disc_weight']}",
            f"gan.loss.perceptual_weight={meta['perceptual_weight']}",
            *overrides,
        ],
    )


def build_networks() -> Networks:
    rae = build_rae("dinov2", noise_tau=CASE.meta["noise_tau"]).train()
    rae.decoder.requires_grad_(True)  # the reference also trains its position table
    disc = build_discriminator("dinodisc_a")
    return Networks(rae, build_lpips(CASE.meta["lpips_base_seed"]), disc)


def prepare(networks, config, backend, phase=EVERYTHING):
    """Place the networks; return the state and the step of a phase."""
    state = make_state(networks.rae.decoder, backend, disc=networks.disc)
    for module in (networks.rae, networks.lpips, networks.disc.backbone):
        backend.place(module)
    return state, make_gan_step(networks, state, phase, config.training, config.gan, backend)


def batch():
    return {
        "image": (CASE["in.images"] * 255).round().to(torch.uint8),
        "row": torch.arange(3, dtype=torch.int32),
        "step": torch.tensor(0, dtype=torch.int32),
        "lr": torch.tensor(CASE.meta["lr"]),
        "disc_lr": torch.tensor(CASE.meta["lr"]),
        "disc_count": torch.tensor(0, dtype=torch.int32),
    }


def feed_recorded(monkeypatch, rounded=None):
    """Use the recorded random numbers, and the recorded images, which are not 8-bit images.

    ``rounded`` is called with the images that are rounded to 8 bits. Values half-way between two
    integers may round either way, so the following computations use the result of the reference.
    """

    def rounded_by_the_reference(images):
        if rounded is not None:
            rounded(images)
        return CASE["mid.fake_quantised"].to(images.device)

    monkeypatch.setattr(gan_step, "CounterRNG", Recorded)
    monkeypatch.setattr(gan_step, "to_unit", lambda image: CASE["in.images"].to(image.device))
    monkeypatch.setattr(gan_step, "_to_8_bits", rounded_by_the_reference)


def recorded_metrics():
    """Return the expected metrics of the step, by name."""
    wanted, disc = CASE.meta["scalars"], CASE.meta["d_scalars"]
    return {
        "train/l1": wanted["rec"],
        "train/lpips": wanted["lpips"],
        "train/gan": wanted["gan"],
        "train/adaptive_weight": wanted["adaptive_weight"],
        "train/loss": wanted["total"],
        "train/grad_norm": wanted["grad_norm_before_clip"],
        "train/skipped": 0.0,
        "train/disc/loss": disc["d_loss"],
        "train/disc/accuracy": disc["accuracy"],
        "train/disc/logits_real": disc["logits_real_mean"],
        "train/disc/logits_fake": disc["logits_fake_mean"],
        "train/disc/grad_norm": disc["grad_norm"],
        "train/disc/skipped": 0.0,
    }
