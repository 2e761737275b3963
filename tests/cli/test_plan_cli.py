"""``rae-xla plan --analytic``: forecasts without compilation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from tiny_captions import make_config

from rae_xla.cli.main import main

pytestmark = pytest.mark.slow

TOPOLOGY = ("--topology", "v6e:2x2", "--batch", "8")


@pytest.fixture
def config(tmp_path) -> Path:
    return tiny.make_configs(tmp_path, "no/such/shards")["stage2"]


def plan(config: Path, *arguments: object) -> int:
    return main(["plan", "--config", str(config), "--analytic", *map(str, arguments)])


def test_an_analytic_plan(config, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ("--images", 80, "--price", 1.5, "--json", out, "training.epochs=3")
    assert plan(config, *TOPOLOGY, *options, "training.steps=null") == 0
    text = capsys.readouterr().out
    assert "v6e-4 (v6e:2x2, 4 chips), 8 images per step" in text
    assert "NOT COMPILED: " in text
    [found] = json.loads(out.read_text())
    assert found["compiled"] is None
    model = found["model"]
    assert model["cost"]["steps"] == 3 * 80 // 8
    assert model["cost"]["price"] == pytest.approx(1.5 * model["cost"]["chip_hours"])
    assert model["bill"] == model["cost"]  # the former name
    assert model["roofline_seconds"]["mfu"] <= 1
    assert model["state_bytes"]["optimizer"] == 8 * model["arithmetic"]["trained"] // 4
    assert f"{model['arithmetic']['trained'] / 1e6:,.1f} M parameters trained" in text


def test_a_plan_of_stage_1(config, capsys):
    file = config.with_name("stage1.yaml")
    assert plan(file, *TOPOLOGY) == 0
    assert "M parameters trained" in capsys.readouterr().out


def test_a_plan_of_text_to_image(tmp_path, capsys):
    file = make_config(tmp_path, "no/such/shards")
    settings = ("text_to_image.row_pattern=[2,1]", "training.grad_accum_steps=2")
    assert plan(file, *TOPOLOGY, *settings) == 0  # the file has the section
    assert "M parameters trained" in capsys.readouterr().out


def test_a_sweep_prints_a_table(config, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert plan(config, "--sweep", "--json", out, "training.global_batch_size=16") == 0
    found = json.loads(out.read_text())
    assert {plan["accelerator"] for plan in found} == {"v5litepod-16", "v6e-16", "v4-32", "v5p-32"}
    assert {plan["batch"] for plan in found} == {16, 32, 64}
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0].split()[:2] == ["slice", "batch"]
    assert len(table) == 1 + 4 * 3


def test_images_of_the_shards_are_counted(config, tmp_path):
    shards = tiny.make_shards(tmp_path)
    out = tmp_path / "plan.json"
    settings = ("training.epochs=5", "training.steps=null")
    assert plan(config, *TOPOLOGY, "--data", shards, "--json", out, *settings) == 0
    assert json.loads(out.read_text())[0]["model"]["cost"]["steps"] == 5 * (tiny.IMAGES // 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --topology"),
        (("--topology", "v6e"), "expected a generation"),
        (("--topology", "v6e-4", "--batch", "x"), "--batch x: expected numbers"),
        (("--topology", "v6e-4", "--batch", "6"), "cannot be split evenly"),
        (("--topology", "v6e-4", "mesh.ici.fsdp=3"), "does not match the 4 devices"),
        (("--topology", "v6e-4", "--images", "0"), "--images 0: "),
        (("--topology", "v6e-4", "--price", "-1"), "--price -1: "),
        (("--topology", "v6e-4", "--batch", "8,-1"), "--batch 8,-1: expected a number"),
        (("--topology", "v6e-4", "--stage", "stage1", "stage_1=null"), "stage_1"),
    ],
)
def test_invalid_options(config, options, message, capsys):
    assert plan(config, *options) == 2
    assert message in capsys.readouterr().err
