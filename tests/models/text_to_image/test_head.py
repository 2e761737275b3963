"""The per-token head of Scale-RAE: golden values, options, initialisation and errors."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.head import FixedTimestepEmbedder, PerTokenDiT
from rae_xla.ops.normalization import RMSNorm
from rae_xla.ops.rotary import RotaryEmbedding, apply_rope
from rae_xla.transport import guided

CASES = ["dit_a", "dit_b", "dit_grid16", "dit_nodrop"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TINY = {
    "input_size": 4,
    "in_channels": 8,
    "condition_dim": 24,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
}


def build(case: Case) -> PerTokenDiT:
    config = case.meta["config"]
    model = PerTokenDiT(
        input_size=round(config["diffusion_tokens"] ** 0.5),
        in_channels=config["diffusion_channels"],
        condition_dim=config["z_channels"],
        hidden_size=config["model_hidden_size"],
        depth=config["model_depth"],
        num_heads=config["model_heads"],
        condition_dropout_prob=config["class_dropout_prob"],
    )
    model.load_state_dict(case.under("state"))
    return model.eval()


def gradient_norms(model: PerTokenDiT) -> dict[str, float]:
    return {k: p.grad.norm().item() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_forward_loss_and_gradients_match_golden_values(name: str) -> None:
    case = load_case(f"t2i/head/{name}")
    model = build(case)
    torch.testing.assert_close(
        model(case["in.x"], case["in.t"], case["in.z"]), case["out.forward"], **CLOSE
    )
    t = case["in.t"][:, None, None, None]
    x_t = (1 - t) * case["in.x0"] + t * case["in.noise"]
    error = model(x_t, case["in.t"], case["in.z"]) - (case["in.noise"] - case["in.x0"])
    losses = error.square().mean((1, 2, 3))
    torch.testing.assert_close(losses, case["out.loss_per_image"], **CLOSE)
    losses.mean().backward()
    norms = gradient_norms(model)
    expected = case.meta["grad_norms"]
    assert {k: norms[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("name", ["dit_a", "dit_b", "dit_grid16"])
def test_null_condition_and_guidance_match_golden_values(name: str) -> None:
    case = load_case(f"t2i/head/{name}")
    model = build(case)
    everything = torch.ones(len(case["in.x"]), dtype=torch.bool)
    null = model(case["in.x"], case["in.t"], case["in.z"], drop=everything)
    torch.testing.assert_close(null, case["out.forward_null"], **CLOSE)

    scale = case.meta["cfg"]["scale"]
    model_fn = guided(model, case["in.z"], scale=scale, null_label=model.null_condition)
    out = model_fn(case["in.x"], case["in.cfg_t"])
    # Guidance multiplies the rounding of both predictions by its scale.
    torch.testing.assert_close(out, case["out.cfg_scale3_correct"], atol=6e-5, rtol=1e-4)


def test_dropped_images_train_the_null_condition() -> None:
    case = load_case("t2i/head/dit_a")
    model = build(case)
    recorded = case.meta["dropout"]
    t = case["in.t"][:, None, None, None]
    x_t = (1 - t) * case["in.x0"] + t * case["in.noise"]
    drop = case["in.drop_u"] < recorded["prob"]
    error = model(x_t, case["in.t"], case["in.z"], drop) - (case["in.noise"] - case["in.x0"])
    losses = error.square().mean((1, 2, 3))
    torch.testing.assert_close(losses, case["out.dropout.loss_per_image"], **CLOSE)
    losses.mean().backward()
    assert gradient_norms(model) == pytest.approx(recorded["grad_norms"], rel=1e-3, abs=1e-8)


def test_tables_match_golden_values() -> None:
    case = load_case("t2i/head/tables")
    embedder = FixedTimestepEmbedder(8)
    torch.testing.assert_close(embedder.W, case["const.t_embedder.W"], atol=0, rtol=0)
    assert "W" not in embedder.state_dict()
    with torch.device("meta"):  # the frequencies are in no file, so they must always have values
        assert torch.equal(FixedTimestepEmbedder(8).W, embedder.W)

    rope = RotaryEmbedding(64, 16)
    torch.testing.assert_close(rope.freqs_cos[::17], case["init.freqs_cos_every_17th"])
    torch.testing.assert_close(rope.freqs_sin[::17], case["init.freqs_sin_every_17th"])
    every_17th = tuple(table[::17] for table in rope())
    torch.testing.assert_close(
        apply_rope(case["in.q"], every_17th), case["out.q_roped_every17th_token"]
    )
    norm = RMSNorm(64)
    norm.load_state_dict(case.under("state.rms"))
    torch.testing.assert_close(norm(case["in.rms_x"]), case["out.rms"], atol=1e-6, rtol=1e-6)


def test_published_head_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = PerTokenDiT()
    assert sum(p.numel() for p in model.parameters()) == 2_435_944_896


def test_untrained_head_predicts_zero() -> None:
    model = PerTokenDiT(**TINY)
    out = model(torch.randn(2, 8, 4, 4), torch.rand(2), torch.randn(2, 16, 24))
    assert torch.count_nonzero(out) == 0
    assert torch.count_nonzero(model.null_condition) == 0


def test_head_without_condition_dropout_refuses_guidance() -> None:
    model = PerTokenDiT(**TINY, condition_dropout_prob=0.0)
    with pytest.raises(UserError, match="without condition dropout"):
        _ = model.null_condition
    with pytest.raises(UserError, match="no null condition"):
        model(
            torch.randn(1, 8, 4, 4),
            torch.rand(1),
            torch.randn(1, 16, 24),
            drop=torch.ones(1, dtype=torch.bool),
        )


def test_number_of_condition_vectors_is_checked() -> None:
    with pytest.raises(UserError, match=r"one condition vector per latent token \(16\), got 9"):
        PerTokenDiT(**TINY)(torch.randn(1, 8, 4, 4), torch.rand(1), torch.randn(1, 9, 24))
