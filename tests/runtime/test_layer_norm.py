"""The layer norm that XLA can split by rows is the layer norm."""

import copy

import pytest
import torch
from torch import nn

from rae_xla.runtime.layer_norm import RowLayerNorm, keep_norms_on_rows


@pytest.mark.parametrize("affine", [True, False])
def test_it_equals_torchs_own(affine):
    norm = nn.LayerNorm(24, eps=1e-6, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    ours = keep_norms_on_rows(copy.deepcopy(norm))
    assert type(ours) is RowLayerNorm
    assert ours.state_dict().keys() == norm.state_dict().keys()
    x = torch.randn(3, 5, 24) * 4 + 2
    given = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = (module(rows) for module, rows in zip((ours, norm), given, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for result in (found, expected):
        result.square().sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-5)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4
        )


def test_dtypes_are_torchs_own():
    norm = nn.LayerNorm(8)
    ours = keep_norms_on_rows(copy.deepcopy(norm))
    rows = torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(2, 8)).dtype == norm(torch.randn(2, 8)).dtype
    assert ours.bfloat16()(rows).dtype == norm.bfloat16()(rows).dtype == torch.bfloat16


def test_other_norms_stay():
    net = nn.Sequential(nn.LayerNorm((2, 3)), nn.BatchNorm1d(3), nn.Sequential(nn.LayerNorm(3)))
    keep_norms_on_rows(net)
    assert [type(m) for m in (net[0], net[1], net[2][0])] == [
        nn.LayerNorm,
        nn.BatchNorm1d,
        RowLayerNorm,
    ]
