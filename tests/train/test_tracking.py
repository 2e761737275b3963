"""Figures reach the file whatever becomes of wandb."""

import json

import numpy as np
import pytest
import wandb

from rae_xla.config import load_config
from rae_xla.train.tracking import Tracker


@pytest.fixture
def fresh_wandb():
    """A process reads wandb's environment once: forget what tests before this one have set."""
    wandb.teardown()
    yield
    wandb.teardown()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def track(folder, *overrides, start=0, steps=(1, 2)):
    config = load_config(None, overrides=list(overrides))
    with Tracker(folder, config, start=start, total=10) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step})
        tracker.images(steps[-1], "stage2", np.zeros((4, 6, 3), np.uint8))


def test_one_line_a_log_step_and_pictures(tmp_path, capsys):
    track(tmp_path)
    assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert (tmp_path / "samples/stage2-00000002.png").exists()
    assert "step       2  loss 0.5" in capsys.readouterr().err


def test_a_resume_drops_the_lines_of_steps_to_come_and_cut_ones(tmp_path):
    track(tmp_path, steps=(1, 2, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    track(tmp_path, start=2, steps=(3, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_wandb_offline_keeps_one_run(fresh_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(tmp_path, "tracking.wandb=true")
    name = (tmp_path / "wandb_id").read_text()
    track(tmp_path, "tracking.wandb=true", start=2, steps=(3,))
    assert (tmp_path / "wandb_id").read_text() == name
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb"))) >= 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_without_wandb_training_goes_on(fresh_wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    track(tmp_path, "tracking.wandb=true")
    assert "going on without it" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
