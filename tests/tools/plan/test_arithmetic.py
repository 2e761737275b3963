"""Parameter and FLOP counts of published models, compared with the paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.tools.plan.arithmetic import count_model
from rae_xla.tools.plan.networks import without_weights

ROOT = Path(__file__).parents[3]


@pytest.mark.slow  # a few seconds, mostly imports
def test_counts_of_dit_dh_s(tmp_path):
    """196 M parameters; 48.5 GMAC forward, 3x in training; 23.4 GMAC for the encoder."""
    file = ROOT / "configs/stage2/ditdh_s_256.yaml"
    config, _ = without_weights(load_config(file, overrides=["data.train=null"]), tmp_path)
    found = count_model(config, "stage2")
    assert found.trained == pytest.approx(196e6, rel=0.01)
    assert (
        found.trained <= found.averaged < found.trained + 1e6
    )  # time frequencies and position embeddings are averaged, too
    assert found.step == pytest.approx(2e9 * (3 * 48.5 + 23.4), rel=0.02)
    assert found.split < found.trained
