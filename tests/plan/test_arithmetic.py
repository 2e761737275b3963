"""Parameters and FLOPs of published runs, against the article's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.plan.arithmetic import count_arithmetic
from rae_xla.plan.networks import without_weights

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # seconds, most of them spent importing
def test_dit_dh_s(tmp_path):
    """196 M parameters; 48.5 GMAC forward, thrice that in training; the encoder's 23.4 once."""
    file = ROOT / "configs/stage2/ditdh_s_256.yaml"
    config, _ = without_weights(load_config(file, overrides=["data.train=null"]), tmp_path)
    found = count_arithmetic(config, "stage2")
    assert found.trained == pytest.approx(196e6, rel=0.01)
    assert found.trained <= found.averaged < found.trained + 1e6  # frequencies and positions too
    assert found.step == pytest.approx(2e9 * (3 * 48.5 + 23.4), rel=0.02)
    assert found.split < found.trained
