"""Layers and embeddings of the diffusion transformers against the golden ``stage2/submodules``."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case
from torch import nn

from rae_xla.errors import UserError
from rae_xla.models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from rae_xla.models.layers import (
    Attention,
    FusedLinear,
    SwiGLU,
    per_token,
)
from rae_xla.ops.rotary import RotaryEmbedding


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("stage2/submodules")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_swiglu(case: Case) -> None:
    layer = SwiGLU(24, 64)
    layer.load_state_dict(case.under("state.swiglu"))
    close(layer(case["in.swiglu.x"]), case["out.swiglu"])


@pytest.mark.parametrize(
    ("name", "use_qknorm", "use_rmsnorm"),
    [("attn_plain", False, True), ("attn_qk_rms", True, True), ("attn_qk_ln", True, False)],
)
def test_attention(case: Case, name: str, use_qknorm: bool, use_rmsnorm: bool) -> None:
    layer = Attention(24, 4, use_qknorm=use_qknorm, use_rmsnorm=use_rmsnorm)
    layer.load_state_dict(case.under(f"state.{name}"))
    close(layer(case[f"in.{name}.x"]), case[f"out.{name}"])


def test_fused_linear_splits_outputs_into_heads() -> None:
    layer, x = FusedLinear(6, 8, 3), torch.randn(2, 5, 6)
    for part, heads in zip(layer(x), layer(x, heads=4), strict=True):
        assert heads.shape == (2, 4, 5, 2)
        torch.testing.assert_close(heads.transpose(1, 2).flatten(2), part)


def test_time_embedding(case: Case) -> None:
    embedder = TimestepEmbedder(24)
    embedder.load_state_dict(case.under("state.fourier"))
    close(embedder(case["in.fourier.t"]), case["out.fourier"])
    assert not embedder.W.requires_grad


@pytest.mark.parametrize(("dim", "grid"), [(16, 4), (24, 5), (64, 16)])
def test_sincos_positions(case: Case, dim: int, grid: int) -> None:
    close(sincos_positions(dim, grid), case[f"out.sincos.{dim}x{grid}"])
    with_cls = sincos_positions(dim, grid, cls_token=True)
    close(with_cls, case[f"out.sincos_cls.{dim}x{grid}"])


def test_label_embedder_drops_to_null_label() -> None:
    case = load_case("stage2/label_embedder")
    config = case.meta["config"]
    embedder = LabelEmbedder(config["num_classes"], config["hidden_size"], config["dropout_prob"])
    embedder.load_state_dict(case.under("state"))
    labels = case["in.labels"]

    embedder.train()
    torch.manual_seed(case.meta["seed"])
    assert torch.equal(embedder.drop(labels), case["out.dropped"])
    dropped = case["in.uniform"] < config["dropout_prob"]
    assert torch.equal(embedder.drop(labels, dropped), case["out.dropped"])

    embedder.eval()
    assert torch.equal(embedder.drop(labels), labels)
    close(embedder(labels), case["out.embed_eval"])
    forced = case["in.force_drop_ids"] == 1
    assert torch.equal(embedder.drop(labels, forced), case["out.forced"])
    close(embedder(labels, forced), case["out.embed_forced"])


def test_label_embedder_has_null_row_only_with_dropout() -> None:
    assert LabelEmbedder(5, 8, 0.1)(torch.tensor([5])).shape == (1, 8)
    with pytest.raises(UserError, match=r"outside 0\.\.4.*num_classes"):
        LabelEmbedder(5, 8, 0.0)(torch.tensor([5]))


def test_per_token_repeats_consecutive_rows() -> None:
    rows = torch.arange(2.0)[None, :, None]
    assert per_token(rows, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert per_token(rows[:, :1], 6).shape == (1, 1, 1)
    with pytest.raises(UserError, match="2 tokens does not fit 5"):
        per_token(rows, 5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Attention(24, 5, use_qknorm=False, use_rmsnorm=True),
            "not divisible by num_heads",
        ),
        (lambda: RotaryEmbedding(6, 4), "not a multiple of 4"),
        (lambda: sincos_positions(30, 4), "multiple of 4"),
    ],
)
def test_incompatible_sizes_raise(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_attention_accepts_mixed_dtypes_under_autocast() -> None:
    layer = Attention(32, 4, use_qknorm=True, use_rmsnorm=True)
    nn.init.normal_(layer.q_norm.weight, mean=1, std=0.1)
    x = torch.randn(2, 16, 32)
    rope = RotaryEmbedding(8, 4)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, rope)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, rope), atol=2e-2, rtol=0)
