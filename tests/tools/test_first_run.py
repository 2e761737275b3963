"""A first run on new hardware, at its tiny size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae_xla.tools.first_run import parity
from rae_xla.tools.first_run.__main__ import main
from rae_xla.tools.first_run.planned import card_of
from rae_xla.tools.first_run.runner import Section, launcher, run_all
from rae_xla.tools.first_run.settings import FirstRun

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly  # two minutes
@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_the_script_writes_one_file(kind, tmp_path):
    out = tmp_path / "first_run.json"
    environment = os.environ | {"SMOKE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = ROOT / f"scripts/first_run_{kind}.sh"
    done = subprocess.run(
        ["bash", script, out], env=environment, capture_output=True, text=True, timeout=600
    )
    found = json.loads(out.read_text())
    sections = {section["title"]: section for section in found["sections"]}
    for title, section in sections.items():
        if title != "doctor":  # it has findings about this machine
            assert section["status"] == "passed", (title, section["message"])
    assert list(tmp_path.iterdir()) == [out]
    assert done.returncode == (0 if sections["doctor"]["status"] == "passed" else 1), done.stderr

    assert sections["parity with recorded numbers, fp32"]["content"]["passed"]
    assert sections["save and resume"]["content"]["checkpoints"] == [4, 8]
    assert sections["save and resume"]["content"]["same_bits"]
    for task in ("stage1", "stage2"):
        step = sections[f"step of {task}"]["content"]
        assert step["step_s"] > 0
        assert step["metrics_are_finite"]
        assert step["rows_per_device"] == step["planned"]["rows"] == 4
        assert step["planned"]["peak_bytes"] > 0
        assert len(step["planned"]["step_s"]) == 2
    modes = sections["sampling modes"]["content"]["modes"]
    assert any("autoguidance" in name for name in modes)
    assert all(mode["images_per_s"] > 0 for mode in modes.values())
    assert any(line.startswith("step of stage2: 4 images per device") for line in found["summary"])


def test_other_numbers_fail_the_comparison():
    assert parity.judge("fp32", parity.LOSSES, parity.PIXELS)["passed"]
    losses = [1.002 * loss for loss in parity.LOSSES]
    assert not parity.judge("fp32", losses, parity.PIXELS)["passed"]
    assert parity.judge("bf16", losses, parity.PIXELS)["passed"]
    pixels = [pixel + 2 for pixel in parity.PIXELS]
    assert not parity.judge("bf16", parity.LOSSES, pixels)["passed"]


def test_what_takes_too_long_is_skipped_and_recorded(tmp_path):
    run = FirstRun(str(tmp_path / "work"), smoke=True, budget=0)
    sections = run_all(run, tmp_path / "out" / "file.json")
    assert {section.status for section in sections} == {"skipped"}
    content = json.loads((tmp_path / "out" / "file.json").read_text())
    assert all("no time is left" in line for line in content["summary"])


def test_commands_and_lines():
    assert launcher(1) == [sys.executable]
    assert launcher(8)[-2:] == ["--nproc-per-node", "8"]
    section = Section("step", "error", 12.3, message="first\nlast\n")
    assert section.line == "error       12 s  step: last"


def test_cards_by_the_name_of_the_accelerator():
    from rae_xla.runtime.accelerators import Accelerator, known_accelerator

    assert card_of(known_accelerator("NVIDIA H100 80GB HBM3")).name == "h100"
    assert card_of(None).name == "4090"
    unknown = card_of(Accelerator("new", 1e15, 64 * 10**9))
    assert 50e9 < unknown.memory_bytes < 64e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gs://bucket/first.json"], "gs:// is not supported here"),
        (["None"], "is text here"),
        (["out.json", "--minutes", "nan"], "--minutes nan: expected a number above 0"),
        (["out.json", "--minutes", "0"], "--minutes 0.0: expected a number above 0"),
    ],
)
def test_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["first_run", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
