"""AdamW computes the same updates as torch's."""

import pytest
import torch

from rae_xla.train.optimizers import AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_equal_torch(weight_decay):
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), ()]
    ours = [torch.randn(shape) for shape in shapes]
    expected = [torch.nn.Parameter(p.clone()) for p in ours]
    reference = torch.optim.AdamW(expected, betas=(0.9, 0.95), weight_decay=weight_decay)
    optimizer = AdamW((0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    first, second = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in range(50):
        lr = 1e-2 / (step + 1)
        gradients = [torch.randn(shape) * 10 ** (step % 5 - 2) for shape in shapes]
        reference.param_groups[0]["lr"] = lr
        for parameter, gradient in zip(expected, gradients, strict=True):
            parameter.grad = gradient.clone()
        reference.step()
        rate, count = torch.tensor(lr), torch.tensor(step)
        optimizer.update(ours, gradients, first, second, rate, count, torch.tensor(True))
        for mine, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, other.detach(), rtol=1e-5, atol=1e-6)


def test_an_update_with_a_non_finite_gradient_can_be_skipped():
    ours, first, second = [torch.ones(3)], [torch.full((3,), 0.2)], [torch.full((3,), 0.3)]
    before = [t.clone() for t in (*ours, *first, *second)]
    optimizer = AdamW((0.9, 0.95), eps=1e-8, weight_decay=0.1)
    gradients = [torch.tensor([1.0, float("nan"), float("inf")])]
    rate, count = torch.tensor(0.1), torch.tensor(5)
    optimizer.update(ours, gradients, first, second, rate, count, torch.tensor(False))
    for left, kept in zip((*ours, *first, *second), before, strict=True):
        assert torch.equal(left, kept)
