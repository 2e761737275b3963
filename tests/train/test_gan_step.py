"""The GAN step equals the reference's; its phases, accumulation and non-finite gradients."""

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
    recorded_metrics,
    settings,
)
from torch import nn

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.runtime import start
from rae_xla.train.gan_step import Phase, _to_8_bits

pytestmark = pytest.mark.slow


@pytest.fixture
def networks():
    return build_networks()


@pytest.fixture
def backend():
    given = RuntimeConfig(backend="torch")
    return start(given, MeshConfig())


def run(step):
    """Run a step; returns its metrics by name."""
    values = step(batch()).tolist()
    return dict(zip(step.metric_names, values, strict=True))


def check_rounding(images):
    """Compare the rounded images with the reference's: few 8-bit values may differ."""
    before, expected = CASE["mid.recon_after_unclamped_pm1"], CASE["mid.fake_quantised"]
    torch.testing.assert_close(images, before, rtol=1e-4, atol=1e-4)
    assert (_to_8_bits(images) != expected).float().mean() < 0.01
    torch.testing.assert_close(_to_8_bits(images), expected, rtol=0, atol=1.01 / 127.5)


def record_gradients(backend):
    """Keep the gradients that the following steps update from; returns them by parameter."""
    found, compute = {}, backend.global_gradients

    def global_gradients(parameters):
        gradients = compute(parameters)
        found.update({p: g.clone() for p, g in zip(parameters, gradients, strict=True)})
        return gradients

    backend.global_gradients = global_gradients
    return found


def test_the_recorded_step(networks, backend, monkeypatch):
    feed_recorded(monkeypatch, rounded=check_rounding)
    gradients = record_gradients(backend)
    state, step = prepare(networks, settings(), backend)
    assert run(step) == pytest.approx(recorded_metrics(), rel=2e-4)
    decoder = dict(networks.rae.decoder.named_parameters())
    for name, norm in CASE.meta["grad_norms"].items():
        gradient = gradients[decoder[name.removeprefix("decoder.")]]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name, expected in CASE.under("grad.decoder").items():
        difference = (gradients[decoder[name]] - expected).norm()
        assert difference <= 1e-3 * expected.norm() + 1e-7, name
    disc = dict(networks.disc.named_parameters())
    for name, expected in CASE.under("dgrad").items():
        difference = (gradients[disc[name]] - expected).norm()
        assert difference <= 1e-3 * expected.norm() + 1e-7, name
    assert all(p.grad is None for p in (*decoder.values(), *disc.values()))
    after = (
        (state.model.module, "decoder_after"),
        (state.ema, "ema_after"),
        (state.disc.module, "disc_after"),
    )
    for module, prefix in after:
        for name, expected in CASE.under(f"out.{prefix}").items():
            actual = module.state_dict()[name].detach()
            # The gradient of a bias before a norm is rounding error, and Adam follows its sign.
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
def test_a_phase_has_its_losses_and_updates(networks, backend, name):
    phase, losses = PHASES[name]
    state, step = prepare(networks, settings(), backend, phase)
    before = {k: v.clone() for k, v in networks.disc.state_dict().items()}
    step(batch())
    known = {"train/l1", "train/lpips", "train/gan", "train/disc/loss"}
    assert set(step.metric_names) & known == losses
    moved = [k for k, v in networks.disc.state_dict().items() if not torch.equal(v, before[k])]
    assert bool(moved) == phase.disc
    assert state.disc.moments["exp_avg"].keys() == dict(networks.disc.named_parameters()).keys()


def test_the_total_loss_is_the_sum_of_the_paper(networks, backend):
    _, step = prepare(networks, settings(), backend)
    metrics = run(step)
    total = metrics["train/l1"] + metrics["train/lpips"]
    total += 0.75 * metrics["train/adaptive_weight"] * metrics["train/gan"]
    assert metrics["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("phase", [Phase(True, False, True), EVERYTHING], ids=str)
def test_gradient_accumulation(backend, phase):
    """Losses and updates are the same, except for the adaptive weight of each micro-batch."""
    images = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    rows = {"image": images.to(torch.uint8), "row": torch.arange(4, dtype=torch.int32)}
    results = []
    for parts in (1, 2):
        networks = build_networks()
        config = settings(f"training.grad_accum_steps={parts}")
        state, step = prepare(networks, config, backend, phase)
        values = step(batch() | rows).tolist()
        weights = state.model.module.state_dict() | state.disc.module.state_dict()
        results.append((dict(zip(step.metric_names, values, strict=True)), weights))
    (whole, after), (accumulated, after_accumulated) = results
    for name in ("train/l1", "train/lpips", "train/disc/logits_fake"):
        assert accumulated[name] == pytest.approx(whole[name], rel=2e-2 if "disc" in name else 1e-5)
    if phase.gan:
        weight = whole["train/adaptive_weight"]
        assert accumulated["train/adaptive_weight"] == pytest.approx(weight, rel=0.3)
        return
    assert accumulated["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    name = "decoder_pred.bias"
    torch.testing.assert_close(after_accumulated[name], after[name], rtol=1e-3, atol=1e-5)


def test_several_discriminator_updates_a_step(networks, backend):
    config = settings("gan.loss.disc_updates=3")
    state, step = prepare(networks, config, backend)
    rates = {"disc_lr_1": torch.tensor(1e-3), "disc_lr_2": torch.tensor(1e-3)}
    before = [p.clone() for p in state.disc.module.parameters()]
    step(batch() | rates)
    moved = max(
        (p - b).abs().max() for p, b in zip(state.disc.module.parameters(), before, strict=True)
    )
    assert 2e-3 < moved <= 3.1e-3  # Adam's first updates have the size of the learning rate


def test_a_non_finite_step_changes_no_weight(networks, backend):
    state, step = prepare(networks, settings("training.clip_grad=1.0"), backend)
    step(batch())
    modules = {"model": state.model.module, "disc": state.disc.module}
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
    moments = {k: v.clone() for k, v in state.model.optimizer_tensors().items()}
    networks.rae.encoder_mean.fill_(float("nan"))  # as a corrupt batch would
    metrics = run(step)
    assert metrics["train/skipped"] == 1
    assert metrics["train/disc/skipped"] == 1
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            if not key.endswith(("weight_u", "weight_v")):
                assert torch.equal(value, before[name][key]), key
            assert torch.isfinite(value).all(), key
    for key, value in state.model.optimizer_tensors().items():
        assert torch.equal(value, moments[key]), key
    assert all(torch.isfinite(p).all() for p in state.ema.parameters())


def test_the_generator_step_leaves_no_gradient_in_the_discriminator(networks, backend):
    _, step = prepare(networks, settings(), backend, Phase(True, True, False))
    step(batch())
    assert all(p.grad is None for p in networks.disc.parameters())
    assert all(p.grad is None for p in networks.lpips.parameters())
    assert all(p.grad is None for p in networks.rae.encoder.parameters())


def test_train_and_eval_modes_are_restored(networks, backend):
    modules: list[nn.Module] = [networks.rae.decoder, networks.disc]
    _, step = prepare(networks, settings(), backend)
    before = [m.training for m in modules]
    step(batch())
    assert [m.training for m in modules] == before
