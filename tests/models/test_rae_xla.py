"""The RAE on XLA: the numbers of plain torch, and no op that falls back to the host."""

from __future__ import annotations

import copy

import pytest
import torch
from rae_cases import build_rae, load_rae_case
from torch import Tensor

from rae_xla.models.rae import RAE

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla


def step(rae: RAE, images: Tensor, level: Tensor, normal: Tensor) -> dict[str, Tensor]:
    """One train-mode reconstruction and its backward: latents, images and every gradient."""
    latents = rae.encode(images, (level, normal))
    found = rae.decode(latents)
    found.square().mean().backward()
    grads = {k: p.grad for k, p in rae.named_parameters() if p.grad is not None}
    return {"latents": latents, "images": found.detach()} | grads


@pytest.mark.parametrize("name", ["dinov2", "siglip2", "mae"])
def test_train_step_on_xla_equals_torch_without_a_fallback(name: str) -> None:
    from torch_xla.debug import metrics

    # First of all: autograd counts the devices once, at the first backward of the process.
    device = torch_xla.device()
    rae = build_rae(name, noise_tau=0.8).train()
    generator = torch.Generator().manual_seed(0)
    images = load_rae_case(name)["in.image1"]  # of another size than the encoder's: resized
    shape = (len(images), rae.num_tokens, rae.latent_size[0])
    inputs = (
        images,
        torch.rand(len(images), generator=generator),
        torch.randn(shape, generator=generator),
    )
    expected = step(copy.deepcopy(rae), *inputs)

    rae.to(device)
    metrics.clear_all()
    found = step(rae, *(value.to(device) for value in inputs))
    torch_xla.sync()
    fallbacks = [counter for counter in metrics.counter_names() if counter.startswith("aten::")]
    assert fallbacks == []
    assert found.keys() == expected.keys()
    found = {key: value.cpu() for key, value in found.items()}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_more_tokens_than_the_decoder_has_on_xla() -> None:
    from torch_xla.debug import metrics

    device = torch_xla.device()
    rae = build_rae("dinov2", normalization_stat_path=None).eval()
    latents = torch.linspace(-2, 2, 32 * 36).reshape(1, 32, 6, 6).sin()
    with torch.no_grad():
        expected = rae.decode(latents)
        rae.to(device)
        metrics.clear_all()
        found = rae.decode(latents.to(device))
        torch_xla.sync()
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_second_call_compiles_nothing() -> None:
    from torch_xla.debug import metrics

    device = torch_xla.device()
    rae = build_rae("dinov2").eval().to(device)
    images = load_rae_case("dinov2")["in.image1"]

    def reconstruct() -> None:
        with torch.no_grad():
            rae(images.to(device))
        torch_xla.sync()

    reconstruct()
    compiled = metrics.metric_data("CompileTime")[0]
    reconstruct()
    assert metrics.metric_data("CompileTime")[0] == compiled
