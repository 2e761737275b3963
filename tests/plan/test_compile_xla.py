"""A training step of DiT-DH-XL's width compiled for a TPU pod, on a machine without a TPU.

Depth 4 + 2 instead of 28 + 2, and an encoder of one layer: 30 to 60 s of compiling for each case on
two free cores, and 3 GB. What it checks of the full depth is in docs/plan.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.plan.chips import parse_topology
from rae_xla.plan.forecast import Forecast
from rae_xla.plan.planner import Request, make_plans
from rae_xla.plan.report import as_json, fits, text_report, text_table
from rae_xla.plan.versions import why_no_compiler
from rae_xla.plan.worker import GB, Limits

ROOT = Path(__file__).parents[2]
LIMITS = Limits(memory=8 * GB, seconds=850)

NO_COMPILER = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
pytestmark = [pytest.mark.xla, pytest.mark.slow, NO_COMPILER]


@pytest.fixture(autouse=True)
def _flags_of_the_tpu_alone(monkeypatch):
    """Those of the other tests are for compiling on a CPU."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def plan_for(folder: Path, topology: str, batch: int, *overrides: str, depth: int = 4) -> Forecast:
    encoder = folder / "encoder"
    encoder.mkdir()
    sizes = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12}
    values = {"model_type": "dinov2_with_registers", "patch_size": 14, "image_size": 518} | sizes
    (encoder / "config.json").write_text(json.dumps(values))
    settings = [
        "data.train=null",
        f"stage_1.params.encoder_config_path={encoder}",
        f"stage_1.params.encoder_params.dinov2_path={encoder}",
        f"stage_2.params.depth=[{depth},2]",
        "runtime.precision=bf16",
    ]
    file = ROOT / "configs/stage2/ditdh_xl_256.yaml"
    config = load_config(file, overrides=[*settings, *overrides])
    request = Request(config, "stage2", limits=LIMITS, price=2.0)
    [plan] = make_plans(request, [parse_topology(topology)], [batch], print)
    assert plan.facts is not None, plan.reason
    return plan


@pytest.mark.parametrize(
    ("batch", "remat", "most", "again", "gigabytes"),
    [(256, 0.0, 1.10, 0.0, 20.0), (1024, 1.0, 1.30, 0.2, 90.0)],
    ids=["kept", "rematerialised"],
)
def test_little_is_sent_and_moved(tmp_path, batch, remat, most, again, gigabytes):
    plan = plan_for(tmp_path, "v6e-16", batch, f"runtime.remat={remat}")
    facts = plan.facts
    assert fits(plan)
    assert facts.faults == []  # no weight gathered in fp32, no activations reduced
    assert facts.unknown_loops == []
    assert 0.4 * plan.minimum < facts.sent <= most * plan.minimum
    # a modulation's weight stays where it is, and so does its gradient
    assert not [c for c in facts.collectives for s in c.shapes if 6912 in s.dims]
    assert facts.compiled.bytes_accessed < gigabytes * 1e9
    assert facts.moved < 1.2 * gigabytes * 1e9  # no loop reads the activations again
    # the traced graph computes what the model asks for, and forward once more where told to
    model = plan.arithmetic.step * batch
    assert (1 + again) * model * 0.98 < facts.flops < (1 + again + 0.15) * model
    # every state tensor is split, and its new value takes the place of the old
    assert facts.arguments["optimizer"] == pytest.approx(plan.state["optimizer"], rel=0.02)
    assert facts.compiled.aliased >= sum(plan.state[k] for k in ("parameters", "optimizer", "ema"))
    assert facts.peak.num_bytes == pytest.approx(facts.compiled.temporaries, rel=0.15)

    text = text_report(plan, "fast")
    assert "fits" in text
    assert "all-gather" in text
    assert "FAULT" not in text
    assert "NOT COMPILED" not in text
    assert "yes" in text_table([replace(plan)])
    content = json.loads(json.dumps(as_json(plan, "fast")))
    assert content["compiled"]["sent_bytes"] == facts.sent
    assert content["compiled"]["fits"] is True


def test_a_step_that_does_not_fit_says_how_much_it_needs(tmp_path):
    """All of it and 1,024 images on one chip."""
    plan = plan_for(tmp_path, "v5e:1x1", 1024, depth=1)
    facts = plan.facts
    assert fits(plan) is False
    assert facts.compiled.used_hbm > plan.case.topology.chip.hbm_bytes
    assert facts.arguments["optimizer"] == plan.state["optimizer"]
    assert "DOES NOT FIT" in text_report(plan, "fast")
    assert " no " in text_table([plan])
