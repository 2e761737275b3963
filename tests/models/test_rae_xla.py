"""RAE on XLA: CPU results, without fallback to the host."""

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
    """Run a reconstruction and its backward pass; return latents, images and gradients."""
    latents = rae.encode(images, (level, normal))
    actual = rae.decode(latents)
    actual.square().mean().backward()
    grads = {k: p.grad for k, p in rae.named_parameters() if p.grad is not None}
    return {"latents": latents, "images": actual.detach()} | grads


@pytest.mark.parametrize("name", ["dinov2", "siglip2", "mae"])
def test_train_step_equals_cpu_without_fallback(name: str) -> None:
    from torch_xla.debug import metrics

    # Before any backward pass, because autograd counts the devices once per process.
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
    actual = step(rae, *(value.to(device) for value in inputs))
    torch_xla.sync()
    fallbacks = [counter for counter in metrics.counter_names() if counter.startswith("aten::")]
    assert fallbacks == []
    assert actual.keys() == expected.keys()
    actual = {key: value.cpu() for key, value in actual.items()}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_more_tokens_than_decoder_grid_on_xla() -> None:
    from torch_xla.debug import metrics

    device = torch_xla.device()
    rae = build_rae("dinov2", normalization_stat_path=None).eval()
    latents = torch.linspace(-2, 2, 32 * 36).reshape(1, 32, 6, 6).sin()
    with torch.no_grad():
        expected = rae.decode(latents)
        rae.to(device)
        metrics.clear_all()
        actual = rae.decode(latents.to(device))
        torch_xla.sync()
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_second_call_does_not_recompile() -> None:
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
