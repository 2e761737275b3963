"""The dashboard shows figures that runs log, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae_xla.train.figures import FIGURES, ROOMS, unknown_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def panels():
    command = [sys.executable, str(ROOT / "infra/wandb/dashboard.py"), "--dry-run"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"PYTHONPATH": str(ROOT), "PROJECT": "digits", "ENTITY": "us"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["project"], shown["entity"]) == ("digits", "us")
    return [panel for section in shown["sections"].values() for panel in section]


def test_panels_are_of_known_figures_and_of_every_room(panels):
    names = [name for panel in panels for name in panel["figures"]]
    assert unknown_names(names) == []
    assert {name.split("/")[0] for name in names} == set(ROOMS)
    assert len(names) == len(set(names))


def test_what_tells_that_a_run_is_well_has_a_panel(panels):
    names = {name for panel in panels for name in panel["figures"]}
    about_to_be_zero = {f.name for f in FIGURES if f.name.endswith(("skipped", "failed"))}
    assert about_to_be_zero | {"perf/fallbacks", "perf/compilations", "data/bad_samples"} <= names
    pictures = [panel for panel in panels if panel["type"] == "Media Browser"]
    assert {name for p in pictures for name in p["figures"]} == {"samples/stage1", "samples/stage2"}
