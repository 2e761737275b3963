"""Rotary position embedding against the golden ``stage2/submodules``."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case

from rae_xla.ops import dispatch
from rae_xla.ops.attention import attention
from rae_xla.ops.rotary import (
    RotaryEmbedding,
    apply_rope,
    rotary_attention,
    rotate_with_fused_backward,
)


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("stage2/submodules")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("half", "grid"), [(4, 4), (6, 3), (36, 16)])
def test_rope_tables(case: Case, half: int, grid: int) -> None:
    rope = RotaryEmbedding(2 * half, grid)
    close(rope.freqs_cos, case[f"out.rope_cos.{half}x{grid}"])
    close(rope.freqs_sin, case[f"out.rope_sin.{half}x{grid}"])


@pytest.mark.parametrize(("half", "grid"), [(4, 4), (6, 3)])
def test_rope_rotates_queries(case: Case, half: int, grid: int) -> None:
    rotated = apply_rope(case[f"in.rope_q.{half}x{grid}"], RotaryEmbedding(2 * half, grid)())
    close(rotated, case[f"out.rope_q.{half}x{grid}"])


def test_rope_rows_repeat_for_longer_sequence(case: Case) -> None:
    close(apply_rope(case["in.rope_repeat"], RotaryEmbedding(8, 4)()), case["out.rope_repeat"])


def test_rope_by_quarter_turn_is_rotate_half(case: Case) -> None:
    rope = RotaryEmbedding(8, 1)
    rope.freqs_cos.fill_(0)
    rope.freqs_sin.fill_(1)
    close(apply_rope(case["in.rotate_half"][:, None], rope())[:, 0], case["out.rotate_half"])


def test_rope_preserves_dtype() -> None:
    x = torch.randn(1, 2, 16, 8, dtype=torch.bfloat16)
    assert apply_rope(x, RotaryEmbedding(8, 4)()).dtype == torch.bfloat16


def test_fused_rope_backward_equals_autograd() -> None:
    # The gradient must be exact for arbitrary tables, not only for sines and cosines.
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    tables = torch.randn(3, 8, 6, dtype=torch.float64).unbind()
    weight = torch.randn_like(x)
    result, expected = (
        torch.autograd.grad((rotated * weight).sum(), x)
        for rotated in (rotate_with_fused_backward(x, *tables), apply_rope(x, tables))
    )
    torch.testing.assert_close(result, expected)


def test_rotary_attention_rotates_queries_and_keys() -> None:
    query, key, value = torch.randn(3, 1, 2, 32, 8).unbind()
    rope = RotaryEmbedding(8, 4)()  # each row serves two tokens
    bias = torch.randn(32, 32)
    rotated = apply_rope(query, rope), apply_rope(key, rope)
    found = rotary_attention(query, key, value.bfloat16(), rope, bias)
    expected = attention(*(x.bfloat16() for x in (*rotated, value)), bias=bias)
    assert torch.equal(found, expected)


def test_rotary_attention_dispatches_without_bias_and_with_one_dtype() -> None:
    query, key, value = torch.randn(3, 1, 2, 32, 8).unbind()
    rope = RotaryEmbedding(8, 4)()
    calls = []

    def implementation(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append([tuple(tensor.shape) for tensor in tensors[3:]])
        return tensors[2]

    with dispatch.register("rotary_attention", "cpu", implementation):
        assert rotary_attention(query, key, value, rope) is value
        rotary_attention(query, key, value, rope, torch.zeros(32, 32))
        rotary_attention(query, key, value.double(), rope)
    assert calls == [[(32, 8)] * 3]
