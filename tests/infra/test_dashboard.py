"""The wandb dashboard shows metrics that runs log, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae_xla.train.metrics import METRIC_GROUPS, METRICS, unknown_names

ROOT = Path(__file__).parents[2]


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


def test_panels_show_known_metrics_of_every_group(panels):
    names = [name for panel in panels for name in panel["metrics"]]
    assert unknown_names(names) == []
    assert {name.split("/")[0] for name in names} == set(METRIC_GROUPS)
    assert len(names) == len(set(names))


def test_signs_of_a_healthy_run_have_a_panel(panels):
    names = {name for panel in panels for name in panel["metrics"]}
    normally_zero = {f.name for f in METRICS if f.name.endswith(("skipped", "failed"))}
    assert normally_zero | {"perf/fallbacks", "perf/compilations", "data/bad_samples"} <= names
    images = [panel for panel in panels if panel["type"] == "Media Browser"]
    assert {name for p in images for name in p["metrics"]} == {"samples/stage1", "samples/stage2"}
