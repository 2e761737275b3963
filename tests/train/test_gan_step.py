"""The GAN step equals the reference's; phases, broken numbers and gradients over all devices."""

from __future__ import annotations

import pytest
import torch
from recorded_gan_step import (
    CASE,
    EVERYTHING,
    batch,
    build_networks,
    feed_recorded,
    prepare,
    recorded_figures,
    settings,
)
from torch import nn

from rae_xla.config import MeshConfig
from rae_xla.config.sections import RuntimeConfig
from rae_xla.runtime import start
from rae_xla.train.gan_step import Phase, _to_8_bits

pytestmark = pytest.mark.unhurried


@pytest.fixture
def networks():
    return build_networks()


@pytest.fixture
def runtime():
    given = RuntimeConfig(backend="torch")
    return start(given, MeshConfig())


def take(step):
    """Take a step; its figures by name."""
    values = step(batch()).tolist()
    return dict(zip(step.names, values, strict=True))


def check_rounding(images):
    """What is rounded is the reference's, and so are all but few of its 8 bits."""
    before, expected = CASE["mid.recon_after_unclamped_pm1"], CASE["mid.fake_quantised"]
    torch.testing.assert_close(images, before, rtol=1e-4, atol=1e-4)
    assert (_to_8_bits(images) != expected).float().mean() < 0.01
    torch.testing.assert_close(_to_8_bits(images), expected, rtol=0, atol=1.01 / 127.5)


def test_the_recorded_step(networks, runtime, monkeypatch):
    feed_recorded(monkeypatch, rounded=check_rounding)
    state, step = prepare(networks, settings(), runtime)
    assert take(step) == pytest.approx(recorded_figures(), rel=2e-4)
    decoder = dict(networks.rae.decoder.named_parameters())
    for name, norm in CASE.meta["grad_norms"].items():
        gradient = decoder[name.removeprefix("decoder.")].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name, expected in CASE.under("grad.decoder").items():
        difference = (decoder[name].grad - expected).norm()
        assert difference <= 1e-3 * expected.norm() + 1e-7, name
    disc = dict(networks.disc.named_parameters())
    for name, expected in CASE.under("dgrad").items():
        assert (disc[name].grad - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name
    after = (
        (state.model.module, "decoder_after"),
        (state.ema, "ema_after"),
        (state.disc.module, "disc_after"),
    )
    for module, prefix in after:
        for name, expected in CASE.under(f"out.{prefix}").items():
            actual = module.state_dict()[name].detach()
            # A bias before a norm has no gradient but rounding, and Adam follows its sign.
            no_gradient = name.endswith((".0.0.bias", "fn.0.bias")) and prefix == "disc_after"
            atol = 2.1 * CASE.meta["lr"] if no_gradient else 1e-4
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol, msg=name)


PHASES = {
    "L1": (Phase(False, False, False), {"train/l1"}),
    "LPIPS": (Phase(True, False, False), {"train/l1", "train/lpips"}),
    "discriminator": (Phase(True, False, True), {"train/l1", "train/lpips", "train/disc/loss"}),
    "GAN": (EVERYTHING, {"train/l1", "train/lpips", "train/gan", "train/disc/loss"}),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_trains_what_it_says(networks, runtime, name):
    phase, losses = PHASES[name]
    state, step = prepare(networks, settings(), runtime, phase)
    before = {k: v.clone() for k, v in networks.disc.state_dict().items()}
    step(batch())
    known = {"train/l1", "train/lpips", "train/gan", "train/disc/loss"}
    assert set(step.names) & known == losses
    moved = [k for k, v in networks.disc.state_dict().items() if not torch.equal(v, before[k])]
    assert bool(moved) == phase.disc
    assert state.disc.moments["exp_avg"].keys() == dict(networks.disc.named_parameters()).keys()


def test_the_total_is_the_sum_the_article_gives(networks, runtime):
    _, step = prepare(networks, settings(), runtime)
    figures = take(step)
    total = figures["train/l1"] + figures["train/lpips"]
    total += 0.75 * figures["train/adaptive_weight"] * figures["train/gan"]
    assert figures["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("phase", [Phase(True, False, True), EVERYTHING], ids=str)
def test_a_batch_in_parts(runtime, phase):
    """The same losses and updates, but for the adaptive weight, which is each part's own."""
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    rows = {"image": images.to(torch.uint8), "row": torch.arange(4, dtype=torch.int32)}
    found = []
    for parts in (1, 2):
        networks = build_networks()
        config = settings(f"training.grad_accum_steps={parts}")
        state, step = prepare(networks, config, runtime, phase)
        values = step(batch() | rows).tolist()
        weights = state.model.module.state_dict() | state.disc.module.state_dict()
        found.append((dict(zip(step.names, values, strict=True)), weights))
    (whole, after), (in_parts, after_parts) = found
    for name in ("train/l1", "train/lpips", "train/disc/logits_fake"):
        assert in_parts[name] == pytest.approx(whole[name], rel=2e-2 if "disc" in name else 1e-5)
    if phase.gan:
        weight = whole["train/adaptive_weight"]
        assert in_parts["train/adaptive_weight"] == pytest.approx(weight, rel=0.3)
        return
    assert in_parts["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    name = "decoder_pred.bias"
    torch.testing.assert_close(after_parts[name], after[name], rtol=1e-3, atol=1e-5)


def test_several_discriminator_updates_a_step(networks, runtime):
    config = settings("gan.loss.disc_updates=3")
    state, step = prepare(networks, config, runtime)
    rates = {"disc_lr_1": torch.tensor(1e-3), "disc_lr_2": torch.tensor(1e-3)}
    before = [p.clone() for p in state.disc.module.parameters()]
    step(batch() | rates)
    moved = max(
        (p - b).abs().max() for p, b in zip(state.disc.module.parameters(), before, strict=True)
    )
    assert 2e-3 < moved <= 3.1e-3  # Adam's first steps are of the learning rate


def test_a_step_that_is_not_finite_changes_no_weight(networks, runtime):
    state, step = prepare(networks, settings("training.clip_grad=1.0"), runtime)
    step(batch())
    modules = {"model": state.model.module, "disc": state.disc.module}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    moments = {k: v.clone() for k, v in state.model.optimizer_tensors().items()}
    networks.rae.encoder_mean.fill_(float("nan"))  # what a broken batch would do
    figures = take(step)
    assert figures["train/skipped"] == 1
    assert figures["train/disc/skipped"] == 1
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if not key.endswith(("weight_u", "weight_v")):
                assert torch.equal(value, before[name][key]), key
            assert torch.isfinite(value).all(), key
    for key, value in state.model.optimizer_tensors().items():
        assert torch.equal(value, moments[key]), key
    assert all(torch.isfinite(p).all() for p in state.ema.parameters())


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(networks, runtime):
    _, step = prepare(networks, settings(), runtime, Phase(True, True, False))
    step(batch())
    assert all(p.grad is None for p in networks.disc.parameters())
    assert all(p.grad is None for p in networks.lpips.parameters())
    assert all(p.grad is None for p in networks.rae.encoder.parameters())


def test_modes_are_as_they_were_after_a_step(networks, runtime):
    modules: list[nn.Module] = [networks.rae.decoder, networks.disc]
    _, step = prepare(networks, settings(), runtime)
    before = [m.training for m in modules]
    step(batch())
    assert [m.training for m in modules] == before
