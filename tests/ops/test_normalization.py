"""RMSNorm against golden values; the row-wise layer norm of XLA against PyTorch's."""

import copy

import pytest
import torch
from golden_case import Case, load_case
from torch import nn

from rae_xla.ops import dispatch
from rae_xla.ops.normalization import LayerNorm, RMSNorm, row_layer_norm


@pytest.fixture(scope="module")
def case() -> Case:
    return load_case("stage2/submodules")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_rmsnorm_in_float32(case: Case) -> None:
    # The golden file stores the weight rounded to bfloat16, for the other two outputs. The float32
    # weight is computed from the first row; the other rows, of which the last ones are far below
    # eps, then check it.
    x, expected = case["in.rms.x"], case["out.rms"]
    norm = RMSNorm(24)
    norm.weight.data = expected[0] / (x[0] / x[0].square().mean().sqrt())
    assert torch.equal(norm.weight.bfloat16().float(), case["state.rms.weight"])
    close(norm(x), expected)


def test_rmsnorm_restores_dtype_before_weight(case: Case) -> None:
    x = case["in.rms.x"].bfloat16()
    norm = RMSNorm(24)
    norm.load_state_dict(case.under("state.rms"))
    promoted = norm(x)
    assert promoted.dtype == torch.float32
    close(promoted, case["out.rms_bf16in_fp32w"])

    half = norm.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    close(half.float(), case["out.rms_bf16"])


@pytest.fixture
def row_layer_norm_on_cpu():
    with dispatch.register("layer_norm", "cpu", row_layer_norm):
        yield


def test_layer_norm_is_pytorchs_by_default():
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    assert torch.equal(LayerNorm(8)(x), nn.LayerNorm(8)(x))


@pytest.mark.usefixtures("row_layer_norm_on_cpu")
@pytest.mark.parametrize("affine", [True, False])
def test_row_layer_norm_equals_pytorchs(affine):
    norm = LayerNorm(24, eps=1e-6, elementwise_affine=affine)
    reference = nn.LayerNorm(24, eps=1e-6, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(3, 5, 24) * 4 + 2
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    result, expected = (m(rows) for m, rows in zip((norm, reference), inputs, strict=True))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    for output in (result, expected):
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            norm.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


@pytest.mark.usefixtures("row_layer_norm_on_cpu")
def test_row_layer_norm_has_pytorchs_dtypes():
    reference = nn.LayerNorm(8)
    norm = LayerNorm(8)
    rows = torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == reference(torch.randn(2, 8)).dtype
    assert norm.bfloat16()(rows).dtype == reference.bfloat16()(rows).dtype == torch.bfloat16


def test_layer_norm_has_pytorchs_state_dict():
    for affine in (True, False):
        ours = LayerNorm(8, elementwise_affine=affine)
        assert copy.deepcopy(ours).state_dict().keys() == (
            nn.LayerNorm(8, elementwise_affine=affine).state_dict().keys()
        )
