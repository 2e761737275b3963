"""In-place updates: the fused implementations equal the elementary ones, and cost less."""

import pytest
import torch
from eager_costs import EagerCosts
from published_loop import clip_grad_norm_
from torch import nn

from rae_xla.ops import updates
from rae_xla.ops.updates import AdamWScalars, AdamWSettings, AdamWTensors, adamw_, average_
from rae_xla.runtime.torch.backend import foreach_norm

SETTINGS = AdamWSettings((0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = [(64, 32), (32,), (3, 5, 7), ()] * 5


def tensors(shapes=SHAPES):
    torch.manual_seed(0)
    lists = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    for second in lists[3]:
        second.square_()
    return AdamWTensors(*lists)


def scalars(**changes):
    given = {
        "lr": torch.tensor(1e-2), "step": torch.tensor(3, dtype=torch.int32),
        "where": torch.tensor(True), "factor": torch.tensor(0.3),
    }  # fmt: skip
    return AdamWScalars(**given | changes)


@pytest.mark.parametrize("factor", [None, 1.0, 0.3])
def test_the_fused_update_equals_the_elementary_one(factor):
    factor = None if factor is None else torch.tensor(factor)
    ours, expected = tensors(), tensors()
    assert updates.fused_adamw(SETTINGS, ours, scalars(factor=factor))
    updates.adamw(SETTINGS, expected, scalars(factor=factor))
    for name in ("parameters", "first", "second"):
        for mine, other in zip(getattr(ours, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-7)


def test_a_gradient_of_another_layout_than_its_parameter():
    """The kernel itself ignores strides; FSDP2 and transposed products give such gradients."""
    ours, expected = tensors([(8, 6)]), tensors([(8, 6)])
    ours.gradients[0] = ours.gradients[0].T.contiguous().T
    adamw_(SETTINGS, ours, scalars())
    updates.adamw(SETTINGS, expected, scalars())
    torch.testing.assert_close(ours.parameters, expected.parameters)


def test_a_skipped_update_changes_nothing_even_with_gradients_that_are_not_finite():
    ours, before = tensors(), tensors()
    for gradient in ours.gradients:
        gradient.fill_(torch.nan)
    adamw_(SETTINGS, ours, scalars(where=torch.tensor(False), factor=torch.tensor(torch.nan)))
    for name in ("parameters", "first", "second"):
        for left, kept in zip(getattr(ours, name), getattr(before, name), strict=True):
            assert torch.equal(left, kept)


def test_mixed_dtypes_are_left_to_the_elementary_update():
    ours = tensors()
    ours.parameters[0] = ours.parameters[0].double()
    assert updates.fused_adamw(SETTINGS, ours, scalars()) is None


def test_an_average_in_one_pass_equals_two():
    averages, values = tensors().first, tensors().parameters
    expected = [0.9 * a + (1 - 0.9) * v for a, v in zip(averages, values, strict=True)]
    average_(averages, values, 0.9)
    torch.testing.assert_close(averages, expected, rtol=1e-6, atol=1e-7)


def test_an_update_needs_20_bytes_a_parameter_with_the_average():
    """Parameter, gradient, two moments and average: nothing besides is allocated."""
    ours = tensors([(256, 256)] * 4)
    averages = [p.clone() for p in ours.parameters]
    count = sum(p.numel() for p in ours.parameters)
    with EagerCosts() as costs:
        adamw_(SETTINGS, ours, scalars())
        average_(averages, ours.parameters, 0.9)
    assert 20 + costs.peak / count <= 20.001
    with EagerCosts() as elementary:
        updates.adamw(SETTINGS, ours, scalars())
    assert elementary.peak / count >= 12


def test_a_compiled_update_has_no_opaque_kernel():
    """A compiler fuses elementary operations; the fused kernel would make it copy the state."""
    ours, expected = tensors(), tensors()
    seen = []

    def record(graph, inputs):
        seen.extend(node.target.__name__ for node in graph.graph.nodes if callable(node.target))
        return graph.forward

    step = torch.compile(lambda: adamw_(SETTINGS, ours, scalars()), backend=record)
    step()
    adamw_(SETTINGS, expected, scalars())
    assert any("foreach" in name for name in seen)
    assert not any("fused" in name for name in seen)
    torch.testing.assert_close(ours.parameters, expected.parameters, rtol=1e-5, atol=5e-7)


def test_launches_and_bytes_are_fewer_than_those_of_the_published_way():
    """clip_grad_norm_, AdamW and a loop over named parameters, as CUDA runs them: foreach."""
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256) for _ in range(30)]
    model, ema = nn.Sequential(*layers), nn.Sequential(*(nn.Linear(256, 256) for _ in range(30)))
    gradients = [torch.randn_like(p) for p in model.parameters()]
    count = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)

    def published():
        clip_grad_norm_(model, 1.0, foreach=True)
        optimizer.step()
        with torch.no_grad():
            averages = dict(ema.named_parameters())
            for name, parameter in model.named_parameters():
                averages[name].mul_(0.9).add_(parameter, alpha=1 - 0.9)

    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    published()  # makes the state of the optimizer
    with EagerCosts() as theirs:
        published()

    parameters = [p.detach() for p in model.parameters()]
    ours = AdamWTensors(
        parameters, gradients, *([torch.zeros_like(p) for p in parameters] for _ in range(2))
    )
    averages = [p.detach() for p in ema.parameters()]
    with EagerCosts() as costs:
        norm = foreach_norm(ours.gradients)
        adamw_(SETTINGS, ours, scalars(factor=(1.0 / (norm + 1e-6)).clamp(max=1.0)))
        average_(averages, parameters, 0.9)
    print(f"launches {costs.launches} {theirs.launches}, bytes a parameter",
          f"{costs.moved / count:.1f} {theirs.moved / count:.1f}")  # fmt: skip
    assert costs.launches < theirs.launches / 4
    assert costs.moved < theirs.moved / 2
