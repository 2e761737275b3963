"""The transformer's parts against the reference numbers of ``stage2/submodules`` and others."""

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
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    TurnedOnce,
    apply_rope,
    per_token,
)


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("stage2/submodules")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_rmsnorm_in_float32(case: Case) -> None:
    # The stored weight is the one rounded to bfloat16 for the other two outputs, so the float32
    # weight is read off the first row; the other rows (the last ones far below eps) then check it.
    x, expected = case["in.rms.x"], case["out.rms"]
    norm = RMSNorm(24)
    norm.weight.data = expected[0] / (x[0] / x[0].square().mean().sqrt())
    assert torch.equal(norm.weight.bfloat16().float(), case["state.rms.weight"])
    close(norm(x), expected)


def test_rmsnorm_restores_the_dtype_before_the_weight(case: Case) -> None:
    x = case["in.rms.x"].bfloat16()
    norm = RMSNorm(24)
    norm.load_state_dict(case.under("state.rms"))
    mixed = norm(x)
    assert mixed.dtype == torch.float32
    close(mixed, case["out.rms_bf16in_fp32w"])

    half = norm.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    close(half.float(), case["out.rms_bf16"])


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


@pytest.mark.parametrize(("half", "grid"), [(4, 4), (6, 3), (36, 16)])
def test_rope_tables(case: Case, half: int, grid: int) -> None:
    rope = RotaryEmbedding(2 * half, grid)
    close(rope.freqs_cos, case[f"out.rope_cos.{half}x{grid}"])
    close(rope.freqs_sin, case[f"out.rope_sin.{half}x{grid}"])


@pytest.mark.parametrize(("half", "grid"), [(4, 4), (6, 3)])
def test_rope_turns_queries(case: Case, half: int, grid: int) -> None:
    turned = apply_rope(case[f"in.rope_q.{half}x{grid}"], RotaryEmbedding(2 * half, grid)())
    close(turned, case[f"out.rope_q.{half}x{grid}"])


def test_rope_rows_serve_several_tokens_of_a_longer_sequence(case: Case) -> None:
    close(apply_rope(case["in.rope_repeat"], RotaryEmbedding(8, 4)()), case["out.rope_repeat"])


def test_rope_by_a_quarter_turn_is_rotate_half(case: Case) -> None:
    rope = RotaryEmbedding(8, 1)
    rope.freqs_cos.fill_(0)
    rope.freqs_sin.fill_(1)
    close(apply_rope(case["in.rotate_half"][:, None], rope())[:, 0], case["out.rotate_half"])


def test_rope_keeps_the_dtype_of_its_input() -> None:
    x = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16)
    assert apply_rope(x, RotaryEmbedding(8, 4)()).dtype == torch.bfloat16


def test_rope_on_xla_turns_gradients_back_as_autograd_does() -> None:
    """Any tables will do: none of the sine and cosine is made use of."""
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    tables = torch.randn(3, 8, 6, dtype=torch.float64).unbind()
    weight = torch.randn_like(x)
    found, expected = (
        torch.autograd.grad((turned * weight).sum(), x)
        for turned in (TurnedOnce.apply(x, *tables), apply_rope(x, tables))
    )
    torch.testing.assert_close(found, expected)


def test_a_fused_layer_cuts_its_parts_into_heads() -> None:
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


def test_label_embedder_drops_to_the_null_label() -> None:
    case = load_case("stage2/label_embedder")
    config = case.meta["config"]
    embedder = LabelEmbedder(config["num_classes"], config["hidden_size"], config["dropout_prob"])
    embedder.load_state_dict(case.under("state"))
    labels = case["in.labels"]

    embedder.train()
    torch.manual_seed(case.meta["seed"])
    assert torch.equal(embedder.drop(labels), case["out.dropped"])
    drawn = case["in.uniform"] < config["dropout_prob"]
    assert torch.equal(embedder.drop(labels, drawn), case["out.dropped"])

    embedder.eval()
    assert torch.equal(embedder.drop(labels), labels)
    close(embedder(labels), case["out.embed_eval"])
    forced = case["in.force_drop_ids"] == 1
    assert torch.equal(embedder.drop(labels, forced), case["out.forced"])
    close(embedder(labels, forced), case["out.embed_forced"])


def test_label_embedder_has_a_null_row_only_when_it_drops() -> None:
    assert LabelEmbedder(5, 8, 0.1)(torch.tensor([5])).shape == (1, 8)
    with pytest.raises(UserError, match=r"outside 0\.\.4.*num_classes"):
        LabelEmbedder(5, 8, 0.0)(torch.tensor([5]))


def test_per_token_repeats_rows_in_place() -> None:
    rows = torch.arange(2.0)[None, :, None]
    assert per_token(rows, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert per_token(rows[:, :1], 6).shape == (1, 1, 1)
    with pytest.raises(UserError, match="2 tokens cannot be spread over 5"):
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
def test_sizes_that_do_not_fit_are_refused(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_attention_takes_mixed_dtypes_under_autocast() -> None:
    layer = Attention(32, 4, use_qknorm=True, use_rmsnorm=True)
    nn.init.normal_(layer.q_norm.weight, mean=1, std=0.1)
    x = torch.randn(2, 16, 32)
    rope = RotaryEmbedding(8, 4)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, rope)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, rope), atol=2e-2, rtol=0)
