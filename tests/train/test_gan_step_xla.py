"""The recorded GAN step on XLA equals the reference's, with one compilation."""

import pytest
import torch
from recorded_gan_step import (
    CASE,
    batch,
    build_networks,
    feed_recorded,
    prepare,
    recorded_metrics,
    settings,
)

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.runtime import start

# By default test_gan_training_xla.py compares steps on XLA with those of plain torch.
pytestmark = [pytest.mark.xla, pytest.mark.nightly]


def test_the_recorded_step(monkeypatch):
    given = RuntimeConfig(backend="xla", devices=1)
    backend = start(given, MeshConfig())
    feed_recorded(monkeypatch)
    networks = build_networks()
    state, step = prepare(networks, settings(), backend)
    backend.synchronize()
    before = backend.compilations()
    [values] = backend.fetch([backend.compile(step)(backend.shard_batch(batch()))])
    metrics = dict(zip(step.metric_names, values.tolist(), strict=True))
    assert metrics == pytest.approx(recorded_metrics(), rel=2e-4)
    assert backend.compilations() == before + 1
    assert backend.fallbacks() == {}
    for module, prefix in ((state.model.module, "decoder_after"), (state.ema, "ema_after")):
        after = backend.to_host(module.state_dict())
        for name, expected in CASE.under(f"out.{prefix}").items():
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-4, msg=name)
