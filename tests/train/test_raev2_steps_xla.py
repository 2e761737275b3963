"""RAEv2's recorded steps on XLA: forward, backward and optimizer, with one compilation."""

import pytest
from golden_case import load_case
from raev2_steps import recorded_steps

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.runtime import start

pytestmark = [pytest.mark.xla, pytest.mark.nightly]


def test_recorded_steps_of_adamw():
    backend = start(RuntimeConfig(backend="xla", devices=1), MeshConfig())
    backend.synchronize()
    before = backend.compilations()
    recorded_steps(load_case("raev2/train/steps_adamw"), backend, 1e-5)
    assert backend.compilations() == before + 1
    assert backend.fallbacks() == {}
