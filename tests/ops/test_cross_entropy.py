"""Cross-entropy in chunks equals that of PyTorch."""

import pytest
import torch
from torch.nn import functional as F

from rae_xla.ops.cross_entropy import IGNORE, cross_entropy


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_losses_and_gradients_equal_those_of_pytorch(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 10, 8), torch.randn(33, 8)
    targets = torch.randint(33, (3, 10)).masked_fill(torch.rand(3, 10) < 0.3, IGNORE)
    targets[2] = IGNORE  # a row without targets
    scale = torch.rand(3)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    sums, matches = cross_entropy(*ours, targets, chunk)
    (sums * scale).sum().backward()
    theirs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    logits = theirs[0] @ theirs[1].T
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
    (expected * scale).sum().backward()
    torch.testing.assert_close(sums, expected)
    assert matches.tolist() == (logits.argmax(-1) == targets).sum(1).tolist()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)
