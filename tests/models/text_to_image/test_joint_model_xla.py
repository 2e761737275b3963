"""The text-to-image model on XLA: CPU results, without fallback or host synchronisation."""

from __future__ import annotations

import copy

import pytest
import torch
from text_to_image_cases import load_joint, prompts, tiny_model
from torch import Tensor

from rae_xla.models.text_to_image.model import TextToImageModel

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla


def step(model: TextToImageModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a forward and a backward pass; return the outputs and the gradients."""
    slots = model.slots(inputs["ids"], inputs["labels"], inputs["features"].shape[1])
    data, exists = model.answer_latents(inputs["features"], slots, inputs["features"].shape[1])
    noisy = data[:, :, None] * 0.3 + inputs["noise"]
    out = model(
        inputs["ids"],
        inputs["labels"],
        inputs["features"],
        slots,
        noisy,
        inputs["times"],
        inputs["drop"],
    )
    images = (out.velocity - inputs["noise"].flatten(0, 2)).square().mean((1, 2, 3))
    images = torch.where(exists, images.reshape(inputs["times"].shape).mean(-1), 0.0)
    loss = out.token_losses.sum() + images.sum()
    if out.auxiliary is not None:
        loss = loss + out.auxiliary.sum()
    if out.base is not None:
        loss = loss + out.base.square().mean()
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"tokens": out.token_losses.detach(), "velocity": out.velocity.detach()} | grads


def compare_with_cpu(model: TextToImageModel, inputs: dict[str, Tensor]) -> None:
    """Compare a step with that on the CPU; nothing runs on the host or is read by it."""
    from torch_xla.debug import metrics

    device = torch_xla.device()
    expected = step(copy.deepcopy(model), inputs)
    model = model.to(device)
    on_device = {key: value.to(device) for key, value in inputs.items()}
    torch_xla.sync()
    metrics.clear_all()
    actual = step(model, on_device)
    torch_xla.sync()
    # `aten::` counters are operations that ran on the host, among them reads of a value.
    assert [counter for counter in metrics.counter_names() if counter.startswith("aten::")] == []
    assert actual.keys() == expected.keys()
    actual = {key: value.cpu() for key, value in actual.items()}
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["query_a", "query_multi_image_k3_aux"])
def test_step_equals_cpu_without_fallback_or_host_reads(name: str) -> None:
    joint = load_joint(name)
    batch, count, _, channels = joint.features.shape
    torch.manual_seed(0)
    times = torch.rand(batch, count, 2)
    inputs = {
        "ids": joint.case["in.input_ids"],
        "labels": joint.case["in.labels"],
        "features": joint.features,
        "times": times,
        "drop": times < 0.3,
        "noise": torch.randn(batch, count, 2, channels, 4, 4),
    }
    compare_with_cpu(joint.model, inputs)


@pytest.mark.parametrize(("kind", "inject"), [("qwen3", "in-context"), ("bert", "cross-attention")])
def test_step_with_contexts_equals_cpu_without_host_reads(kind: str, inject: str) -> None:
    ids = prompts()
    torch.manual_seed(0)
    times = torch.rand(3, 1, 2)
    inputs = {
        "ids": ids,
        "labels": torch.full_like(ids, -100),
        "features": torch.randn(3, 1, 4, 3),
        "times": times,
        "drop": times < 0,
        "noise": torch.randn(3, 1, 2, 3, 2, 2),
    }
    compare_with_cpu(tiny_model(kind, inject), inputs)
