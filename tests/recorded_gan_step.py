"""The reference's step of stage 1 (``golden/train/stage1_one_step``): networks, draws, numbers."""

from __future__ import annotations

import torch
from gan_cases import build_discriminator, build_lpips
from golden_case import load_case
from rae_cases import build_rae

from rae_xla.config import load_config
from rae_xla.train import gan_step
from rae_xla.train.gan_step import Networks, Phase, make_gan_step
from rae_xla.train.state import make_state

CASE = load_case("train/stage1_one_step")
EVERYTHING = Phase(lpips=True, gan=True, disc=True)
_DRAWS = {"augment for decoder": "g", "augment fake 0": "d_fake", "augment real 0": "d_real"}


class Recorded:
    """The draws of the recorded step, in place of ``Draws``."""

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

    def once(self, purpose, count):
        return self._get(f"{_DRAWS[purpose.split(':')[0]]}_rand3")


def settings(*overrides):
    """The recorded step's settings."""
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
    rae.decoder.requires_grad_(True)  # the reference trains its position table too
    disc = build_discriminator("dinodisc_a")
    return Networks(rae, build_lpips(CASE.meta["lpips_base_seed"]), disc)


def prepare(networks, config, runtime, phase=EVERYTHING):
    """The state and the step of a phase, the networks placed."""
    state = make_state(networks.rae.decoder, runtime, disc=networks.disc)
    for module in (networks.rae, networks.lpips, networks.disc.backbone):
        runtime.place(module)
    return state, make_gan_step(networks, state, phase, config.training, config.gan, runtime)


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
    """Feed the recorded draws, and the recorded images, which are not of 8 bits.

    ``rounded`` looks at what is rounded to 8 bits. A value half-way between two may go either way,
    so the steps after get what the reference made of it.
    """

    def as_the_reference_rounded(images):
        if rounded is not None:
            rounded(images)
        return CASE["mid.fake_quantised"].to(images.device)

    monkeypatch.setattr(gan_step, "Draws", Recorded)
    monkeypatch.setattr(gan_step, "to_unit", lambda image: CASE["in.images"].to(image.device))
    monkeypatch.setattr(gan_step, "_to_8_bits", as_the_reference_rounded)


def recorded_figures():
    """What the step must report, by name."""
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
