"""The recorded GAN step on XLA: the reference's numbers, in one graph."""

import pytest
import torch
from recorded_gan_step import (
    CASE,
    batch,
    build_networks,
    feed_recorded,
    prepare,
    recorded_figures,
    settings,
)

from rae_xla.config import MeshConfig
from rae_xla.config.sections import RuntimeConfig
from rae_xla.runtime import start

pytestmark = pytest.mark.xla


def test_the_recorded_step(monkeypatch):
    given = RuntimeConfig(backend="xla", devices=1)
    runtime = start(given, MeshConfig())
    feed_recorded(monkeypatch)
    networks = build_networks()
    state, step = prepare(networks, settings(), runtime)
    runtime.synchronize()
    before = runtime.compilations()
    [values] = runtime.fetch([runtime.compile(step)(runtime.put(batch()))])
    figures = dict(zip(step.names, values.tolist(), strict=True))
    assert figures == pytest.approx(recorded_figures(), rel=2e-4)
    assert runtime.compilations() == before + 1
    assert runtime.fallbacks() == {}
    for module, prefix in ((state.model.module, "decoder_after"), (state.ema, "ema_after")):
        after = runtime.to_host(module.state_dict())
        for name, expected in CASE.under(f"out.{prefix}").items():
            torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-4, msg=name)
