"""Attention: the einsum implementation of XLA against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from rae_xla.ops import dispatch
from rae_xla.ops.attention import MASKED, attention, einsum_attention

# Of two rows, the first one sees 5 keys and the second one 2.
BIAS = torch.where(torch.arange(5) < torch.tensor([[5], [2]]), 0.0, MASKED)[:, None, None]


@pytest.mark.parametrize("options", [{}, {"bias": BIAS}, {"causal": True}], ids=list)
def test_einsum_attention_equals_pytorch(options):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3)]
    weight = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    gradients = []
    for function in (einsum_attention, attention):
        inputs = [t.clone().requires_grad_() for t in tensors]
        output = function(*inputs, **options)
        gradients.append((output, *torch.autograd.grad((output * weight).sum(), inputs)))
    for result, expected in zip(*gradients, strict=True):
        # The weights are computed in float32.
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_einsum_attention_is_the_implementation_on_xla():
    assert dispatch.implementations("attention", "xla")[-1] is einsum_attention


def test_attention_without_implementation_is_pytorchs():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(attention(q, k, v, causal=True), causal)
    kept = torch.tensor([[True, True, False, True]])
    found = attention(q, k, v, bias=torch.where(kept, 0.0, MASKED))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=kept))
