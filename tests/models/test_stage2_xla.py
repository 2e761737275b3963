"""Diffusion transformers on XLA: CPU results, without fallback to the host."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla

SHARED = {"input_size": 4, "in_channels": 8, "num_classes": 5}
# In-context conditioning, base head and REPA projection, as in RAEv2.
TOKENS = {
    "conditioning": "tokens",
    "base_model_depth": 2,
    "repa_layer_depth": 1,
    "z_dim": 8,
    "use_qknorm": True,
    "use_pos_embed": False,
}
MODELS = {
    "dit_dh": lambda: DiTDH(hidden_size=[32, 48], depth=[2, 1], num_heads=[4, 4], **SHARED),
    "dit_dh_qknorm_layernorm": lambda: DiTDH(
        hidden_size=[32, 32],
        depth=[1, 1],
        num_heads=4,
        use_qknorm=True,
        use_rmsnorm=False,
        use_swiglu=False,
        **SHARED,
    ),
    "lightning_dit": lambda: LightningDiT(hidden_size=32, depth=2, num_heads=4, **SHARED),
    "lightning_dit_patch2": lambda: LightningDiT(
        hidden_size=32, depth=1, num_heads=4, patch_size=2, learn_sigma=True, **SHARED
    ),
    "dit_dh_tokens": lambda: DiTDH(
        hidden_size=[32, 48], depth=[3, 1], num_heads=[4, 4], **TOKENS, **SHARED
    ),
    "lightning_dit_tokens": lambda: LightningDiT(
        hidden_size=32, depth=2, num_heads=4, **TOKENS, **SHARED
    ),
}


def step(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a forward and a backward pass; return the output and the gradients."""
    x, t, y, drop, target = inputs
    outputs = model(x, t, y, label_drop=drop, all_outputs=True)
    found = {name: value for name, value in outputs._asdict().items() if value is not None}
    targets = {"full": target, "base": target, "repa": target.flatten(2).transpose(1, 2)}
    sum((value - targets[name]).square().mean() for name, value in found.items()).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()} | grads


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_equal_cpu_without_fallback(name: str) -> None:
    from torch_xla.debug import metrics

    # Before any backward pass, because autograd counts the devices once per process.
    device = torch_xla.device()
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    inputs = (
        torch.randn(4, 8, 4, 4),
        torch.linspace(0.1, 0.9, 4),
        torch.tensor([0, 1, 2, 4]),
        torch.tensor([False, True, False, False]),
        torch.randn(4, 8, 4, 4),
    )
    expected = step(copy.deepcopy(model), *inputs)

    model.to(device)
    metrics.clear_all()
    actual = step(model, *(value.to(device) for value in inputs))
    torch_xla.sync()
    fallbacks = [counter for counter in metrics.counter_names() if counter.startswith("aten::")]
    assert fallbacks == []
    assert actual.keys() == expected.keys()
    actual = {key: value.cpu() for key, value in actual.items()}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
