"""``rae-xla plan --gpus``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from rae_xla.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path) -> Path:
    return tiny.make_configs(tmp_path, "no/such/shards")["stage2"]


def plan(config: Path, *arguments: object) -> int:
    return main(["plan", "--config", str(config), *map(str, arguments)])


def test_a_plan_for_gpus(config, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ("--gpus", "2x4090,2xh100", "--json", out, "--price", 2, "runtime.precision=bf16")
    assert plan(config, *options, "--batch", 16) == 0
    text = capsys.readouterr().out
    assert "2x4090 (NVIDIA GeForce RTX 4090), 16 images per step (2 GPUs x 1 x 8)" in text
    assert "fits" in text
    first, second = json.loads(out.read_text())
    assert (first["gpus"], second["gpus"]) == ("2x4090", "2xh100")
    assert first["counted"] == second["counted"]  # counted once
    assert first["memory"]["largest_rows"] < second["memory"]["largest_rows"]
    assert first["model"]["slow"]["step"] > first["model"]["fast"]["step"]
    assert {sent["kind"] for sent in first["counted"]["sent"]} >= {"all-gather", "reduce-scatter"}
    table = text.split("\n\n")[-1].splitlines()
    assert table[0].split()[:3] == ["GPUs", "settings", "batch"]
    assert len(table) == 3


def test_the_status_is_1_if_a_run_does_not_fit(config, capsys):
    assert plan(config, "--gpus", "1x4090", "--batch", 2**20) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "fits with training.grad_accum_steps=" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "1xv100"), "unknown GPU v100"),
        (("--gpus", "1x4090", "--topology", "v6e-4"), "give only one of them"),
        (("--gpus", "8x4090", "--batch", "6"), "cannot be split evenly"),
        (("--gpus", "8x4090", "mesh.ici.fsdp=3"), "does not match the 8 devices"),
        (("--gpus", "2x4090", "mesh.ici.fsdp=1", "mesh.ici.tensor=2"), "no tensor parallelism"),
    ],
)
def test_invalid_options(config, options, message, capsys):
    assert plan(config, *options) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
