"""An eager step against the published one, with the same model: launches and bytes, counted."""

import pytest
import torch
from eager_costs import EagerCosts
from published_loop import PublishedLoop

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import make_train_step
from rae_xla.transport import create_transport

BATCH, CHANNELS, SIDE = 2, 8, 2


def build_model():
    """DiT-DH-XL with as many blocks and tensors as published, but narrow."""
    torch.manual_seed(0)
    return DiTDH(SIDE, 1, CHANNELS, [16, 16], [28, 2], [2, 2], num_classes=4).train()


@pytest.fixture(scope="module")
def costs():
    """The costs of a whole step: ours and theirs, with foreach operations as on CUDA."""
    backend, transport = start(RuntimeConfig(backend="torch"), MeshConfig()), create_transport()
    model, latents = build_model(), torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    labels = torch.arange(BATCH)

    def loss(batch, draws):
        dropout, for_time = draws.uniforms("label dropout", "time")
        return transport.training_losses(
            model,
            latents,
            {"y": labels, "label_drop": dropout < 0.1},
            t=transport.sample_times(for_time),
            noise=draws.normal("noise", latents.shape[1:]),
        )["loss"]

    step = make_train_step(
        loss, make_state(model, backend), AdamW((0.9, 0.95), 1e-8, 0.0), seed=0,
        ema_decay=0.9995, clip_grad=1.0, accumulate=1, backend=backend,
    )  # fmt: skip
    batch = {
        "row": torch.arange(BATCH, dtype=torch.int32),
        "step": torch.tensor(3, dtype=torch.int32),
        "lr": torch.tensor(2e-4),
    }
    published = PublishedLoop(build_model(), transport, foreach=True)
    works = {"ours": lambda: step(batch), "theirs": lambda: published.step(latents, labels)}
    found = {}
    for name, work in works.items():
        work()  # makes the state of the optimizer
        with EagerCosts() as found[name]:
            work()
    return found


def test_a_step_launches_fewer_kernels(costs):
    ours, theirs = costs["ours"].launches, costs["theirs"].launches
    print(f"launches: ours {ours}, published {theirs}")
    assert ours < theirs - 300  # forward and backward are equal


def test_a_step_moves_fewer_bytes(costs):
    """50 bytes a parameter less, and the draws of these few latents hardly count."""
    parameters = sum(p.numel() for p in build_model().parameters())
    saved = (costs["theirs"].moved - costs["ours"].moved) / parameters
    print(f"bytes a parameter less than the published way: {saved:.0f}")
    assert saved > 40
