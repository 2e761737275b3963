"""A training step with the widths of DiT-DH-XL, compiled for a TPU slice without a TPU.

Depth is 4 + 2 instead of 28 + 2 and the encoder has one layer: each case compiles in 30 to 60 s on
two idle cores and needs 3 GB. docs/plan.md has the results at full depth.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.tools.plan.compile import why_no_compiler
from rae_xla.tools.plan.forecast import Forecast
from rae_xla.tools.plan.planner import PlanRequest, make_forecasts
from rae_xla.tools.plan.tables import forecast_json, forecast_table, forecast_text
from rae_xla.tools.plan.tpus import parse_topology
from rae_xla.tools.plan.worker import GB, Limits

ROOT = Path(__file__).parents[3]
LIMITS = Limits(memory=8 * GB, seconds=850)

NO_COMPILER = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
pytestmark = [pytest.mark.xla, pytest.mark.slow, NO_COMPILER]


@pytest.fixture(autouse=True)
def _without_cpu_flags(monkeypatch):
    """The XLA flags of the test suite are for compilation on a CPU."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def forecast_for(
    folder: Path, topology: str, batch: int, *overrides: str, depth: int = 4
) -> Forecast:
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
    request = PlanRequest(config, "stage2", limits=LIMITS, price=2.0)
    [forecast] = make_forecasts(request, [parse_topology(topology)], [batch])
    assert forecast.step is not None, forecast.not_compiled
    return forecast


@pytest.mark.parametrize(
    ("batch", "remat", "attention", "max_ratio", "recomputed", "gigabytes"),
    [
        (256, 0.0, "flash", 0.70, 0.0, 17.0),
        pytest.param(1024, 1.0, "auto", 1.30, 0.2, 90.0, marks=pytest.mark.nightly),
    ],
    ids=["stored", "rematerialised"],
)
def test_communication_and_memory_traffic_are_bounded(
    tmp_path, batch, remat, attention, max_ratio, recomputed, gigabytes
):
    settings = [f"runtime.remat={remat}", f"runtime.attention={attention}"]
    forecast = forecast_for(tmp_path, "v6e-16", batch, *settings)
    step = forecast.step
    assert forecast.fits
    assert step.faults == []  # no weight gathered in fp32, no activations reduced
    assert step.unknown_loops == []
    minimum = forecast.fsdp_minimum
    assert 0.4 * minimum < step.bytes_sent <= max_ratio * minimum
    # neither weights nor gradients of the modulations are sent
    assert not [c for c in step.collectives for s in c.shapes if 6912 in s.dims]
    assert step.result.bytes_accessed < gigabytes * 1e9
    assert step.hbm_traffic < 1.2 * gigabytes * 1e9  # no loop reads all activations
    # the traced graph has the FLOPs of the model, plus a forward pass if rematerialised
    model = forecast.counts.step * batch
    assert (1 + recomputed) * model * 0.98 < step.flops < (1 + recomputed + 0.15) * model
    # every state tensor is sharded, and its buffer is reused for its new value
    state = forecast.state_bytes
    assert step.arguments["optimizer"] == pytest.approx(state["optimizer"], rel=0.02)
    assert step.result.aliased >= sum(state[k] for k in ("parameters", "optimizer", "ema"))
    assert step.peak.num_bytes == pytest.approx(step.result.temporaries, rel=0.15)

    text = forecast_text(forecast, "fast")
    assert "fits" in text
    assert "all-gather" in text
    assert "FAULT" not in text
    assert "NOT COMPILED" not in text
    assert "yes" in forecast_table([replace(forecast)])
    content = json.loads(json.dumps(forecast_json(forecast, "fast")))
    assert content["compiled"]["sent_bytes"] == step.bytes_sent
    assert content["compiled"]["fits"] is True


@pytest.mark.nightly
def test_a_step_that_does_not_fit_reports_the_memory_it_needs(tmp_path):
    """The whole training state and 1,024 images on one chip."""
    forecast = forecast_for(tmp_path, "v5e:1x1", 1024, depth=1)
    step = forecast.step
    assert forecast.fits is False
    assert step.result.required_hbm > forecast.case.topology.generation.hbm_bytes
    assert step.arguments["optimizer"] == forecast.state_bytes["optimizer"]
    assert "DOES NOT FIT" in forecast_text(forecast, "fast")
    assert " no " in forecast_table([forecast])


@pytest.mark.nightly
def test_the_rows_of_text_to_image_stay_on_their_devices(tmp_path):
    """Two blocks of each network, with Scale-RAE's rows of 512 tokens and 256 queries."""
    sizes = (
        "model_type: qwen2, hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2, "
        "num_attention_heads: 8, num_key_value_heads: 4, vocab_size: 4096"
    )
    head = {"depth": 2, "hidden_size": 512, "num_heads": 8, "condition_dim": 512}
    settings = [
        "data.train=null",
        "runtime.precision=bf16",
        "text_to_image.language_model=null",
        f"text_to_image.language_model_config={{{sizes}}}",
        *(f"text_to_image.head.{name}={value}" for name, value in head.items()),
    ]
    config = load_config(ROOT / "configs/t2i/qwen2.5_1.5b_dit2.4b_siglip2.yaml", settings)
    request = PlanRequest(config, "t2i", limits=LIMITS)
    [forecast] = make_forecasts(request, [parse_topology("v6e-16")], [64])
    assert forecast.step is not None, forecast.not_compiled
    assert forecast.step.faults == []
    assert forecast.step.bytes_sent < 1.15 * forecast.fsdp_minimum
