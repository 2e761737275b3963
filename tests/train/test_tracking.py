"""Figures reach the file whatever becomes of wandb, and wandb's run is one however it is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wandb_server import WandbServer, wait_until

from rae_xla.config import load_config
from rae_xla.train.figures import FIGURES, ROOMS, markdown_table, unknown_names
from rae_xla.train.rollback import SkippedStepsError
from rae_xla.train.tracking import Tracker
from rae_xla.train.wandb_sink import QUEUE, WandbSink, wandb_place
from rae_xla.train.watchdog import EXIT_HUNG

ROOT = Path(__file__).parents[2]


@pytest.fixture
def at(monkeypatch):
    """Points wandb at a server, with a key that looks like one."""

    def point(server, **environment):
        variables = {"WANDB_BASE_URL": server, "WANDB_API_KEY": "a" * 40, "WANDB_MODE": "online"}
        for name, value in (variables | environment).items():
            monkeypatch.setenv(name, value)

    return point


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def track(folder, *overrides, start=0, steps=(1, 2)):
    config = load_config(None, overrides=list(overrides))
    with Tracker(folder, config, start=start, total=10) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step})
        tracker.images(steps[-1], "stage2", np.zeros((4, 6, 3), np.uint8), "black")


def sync(folder):
    """``wandb sync`` of a results folder, as a user does it."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", str(folder / "wandb")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ, cwd=folder
    )


def test_one_line_a_log_step_and_pictures(tmp_path, capsys):
    track(tmp_path)
    assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert (tmp_path / "samples/stage2-00000002.png").exists()
    assert "step       2/10  loss 0.5\n" in capsys.readouterr().err
    assert not (tmp_path / "wandb").exists()


def test_the_console_tells_how_long_it_will_take(tmp_path, capsys):
    with Tracker(tmp_path, load_config(None), start=0, total=1000) as tracker:
        tracker.log(100, {"perf/step_time": 0.5})
        tracker.log(1000, {"perf/step_time": 0.5})
    first, last = capsys.readouterr().err.splitlines()
    assert first == "step     100/1000  step_time 0.5  left 07:30"
    assert last == "step    1000/1000  step_time 0.5"


def test_a_resume_drops_the_lines_of_steps_to_come_and_cut_ones(tmp_path):
    track(tmp_path, steps=(1, 2, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    track(tmp_path, start=2, steps=(3, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_sync_makes_one_run_of_the_parts_that_were_offline(at, tmp_path, capsys):
    with WandbServer() as server:
        at(server.url, WANDB_MODE="offline")
        track(tmp_path, "tracking.wandb=true", "training.steps=77")
        track(tmp_path, "tracking.wandb=true", "training.steps=77", start=2, steps=(3, 4))
        assert server.runs == {}, "nothing was sent"
        parts = list((tmp_path / "wandb").glob("offline-run-*"))
        said = capsys.readouterr().err
        assert len(parts) == 2
        assert all(f"wandb sync {part}" in said for part in parts)
        done = sync(tmp_path)
        assert done.returncode == 0, done.stderr
        [name] = server.runs
        run = server.runs[name]
    assert name == (tmp_path / "wandb_id").read_text()
    assert run.curve("train/loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert run.config["training"]["value"]["steps"] == 77
    pictures = dict(run.curve("samples/stage2"))
    assert pictures.keys() == {2, 4}
    assert pictures[2]["caption"] == "step 2: black"
    assert any(file.startswith("media/images/samples/stage2_2") for file in run.files)


@pytest.mark.slow
def test_online_runs_are_resumed_and_alert(at, tmp_path, capsys):
    with WandbServer() as server:
        at(server.url, WANDB_PROJECT="digits")
        with pytest.raises(SkippedStepsError):
            fail(tmp_path)
        track(tmp_path, "tracking.wandb=true", start=2, steps=(3,))
        [run] = server.runs.values()
    assert [step for step, _ in run.curve("train/loss")] == [1, 2, 3]
    assert run.alerts == ["Steps are skipped", "Told to stop", "Steps keep being skipped"]
    assert f"wandb: {server.url}" in capsys.readouterr().err


def fail(folder):
    with Tracker(folder, load_config(None, ["tracking.wandb=true"]), start=0, total=9) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.log(2, {"train/loss": 1.0, "train/skipped": 1})
        tracker.stopping(2, "SIGTERM")
        raise SkippedStepsError(2, 1, 0)


HANGS = """
import sys, time
from pathlib import Path
from rae_xla.config import load_config
from rae_xla.train.tracking import Tracker
from rae_xla.train.watchdog import DATA, Watchdog

folder, config = Path(sys.argv[1]), load_config(None, overrides=["tracking.wandb=true"])
with Watchdog(1, folder) as watchdog, Tracker(folder, config, start=0, total=9) as tracker:
    watchdog.tell = tracker.stalled
    tracker.log(1, {"train/loss": 1.0})
    watchdog.begin(DATA, 1)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_the_last_words_of_a_run_that_hangs_arrive_after_its_end(at, tmp_path):
    with WandbServer() as server:
        at(server.url)
        command = [sys.executable, "-c", HANGS, str(tmp_path)]
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=120,
            check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == EXIT_HUNG
        wait_until(lambda: any(run.alerts for run in server.runs.values()))
        [run] = server.runs.values()
        assert run.alerts == ["Nothing moves"]
        wait_until(lambda: run.curve("train/loss") == [(1, 1.0)])


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["refuses", "broken", "hangs"])
def test_where_the_server_does_not_answer_the_run_is_kept(mood, at, tmp_path, capsys):
    with WandbServer(mood) as server:
        at("http://127.0.0.1:9" if mood == "refuses" else server.url)
        track(tmp_path, "tracking.wandb=true")
        said = capsys.readouterr().err
        assert said.count("the run is kept on the disk") == 1
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        assert server.runs == {}
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_key_that_is_none_is_said_and_the_run_kept(at, tmp_path, capsys):
    with WandbServer() as server:
        at(server.url, WANDB_API_KEY="not a key")
        track(tmp_path, "tracking.wandb=true")
    assert "the run is kept on the disk" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_what_does_not_fit_is_dropped_and_counted_once(at, tmp_path):
    at("http://127.0.0.1:9", WANDB_MODE="disabled")
    said = []
    sink = WandbSink(tmp_path, load_config(None).tracking, {}, said.append)
    for step in range(3 * QUEUE):  # while it starts
        sink.put("log", step=step, figures={"train/loss": 0.5})
    assert sink.dropped >= QUEUE / 2
    sink.close(0)
    assert len([line for line in said if "too slow" in line]) == 1
    assert f"wandb: {sink.dropped} messages did not reach it" in said[-1]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ("rae_xla", None)),
        ({"PROJECT": "p", "ENTITY": "e"}, ("p", "e")),
        (
            {"WANDB_PROJECT": "wp", "WANDB_ENTITY": "we", "PROJECT": "p", "ENTITY": "e"},
            ("wp", "we"),
        ),
    ],
)
def test_project_and_entity_from_either_name(environment, place, monkeypatch):
    for name in ("PROJECT", "ENTITY", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracking = load_config(None).tracking
    assert tuple(wandb_place(tracking).values()) == place
    chosen = load_config(None, ["tracking.project=mine"]).tracking
    assert wandb_place(chosen)["project"] == "mine"


def test_names_of_figures_are_of_the_list():
    assert {figure.name.split("/")[0] for figure in FIGURES} == set(ROOMS)
    assert (
        unknown_names(["train/loss", "train/disc/loss", "eval/model/psnr", "opt/disc_lr_1"]) == []
    )
    wrong = ["epoch", "disc/loss", "train/los", "perf/steptime", "checkpoint/seconds"]
    assert unknown_names(wrong) == wrong


def test_the_table_in_the_docs_is_the_list():
    assert markdown_table() in (ROOT / "docs/monitoring.md").read_text()
