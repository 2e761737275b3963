"""Metrics reach the file whatever happens to wandb; restarts continue one wandb run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wandb_server import WandbServer, wait_until

from rae_xla.config import load_config
from rae_xla.progress import configure_logging, reset_logging
from rae_xla.train.callbacks.watchdog import EXIT_HUNG
from rae_xla.train.metrics import METRIC_GROUPS, METRICS, markdown_table, unknown_names
from rae_xla.train.rollback import SkippedStepsError
from rae_xla.train.tracking.tracker import Tracker
from rae_xla.train.tracking.wandb_sink import QUEUE_SIZE, WandbSink, wandb_place

ROOT = Path(__file__).parents[3]


@pytest.fixture
def console():
    """Logs to stderr as the command line does."""
    configure_logging()
    yield
    reset_logging()


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
        tracker.image(steps[-1], "stage2", np.zeros((4, 6, 3), np.uint8), "black")


def sync(folder):
    """``wandb sync`` of a results folder, as a user does it."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", str(folder / "wandb")]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ, cwd=folder
    )


def test_a_line_per_log_step_and_images(tmp_path, capsys, console):
    track(tmp_path)
    assert lines(tmp_path) == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert (tmp_path / "samples/stage2-00000002.png").exists()
    assert "step       2/10  loss 0.5\n" in capsys.readouterr().err
    assert not (tmp_path / "wandb").exists()


def test_the_console_shows_the_time_left(tmp_path, capsys, console):
    with Tracker(tmp_path, load_config(None), start=0, total=1000) as tracker:
        tracker.log(100, {"perf/step_time": 0.5})
        tracker.log(1000, {"perf/step_time": 0.5})
    first, last = capsys.readouterr().err.splitlines()
    assert first == "step     100/1000  step_time 0.5  left 07:30"
    assert last == "step    1000/1000  step_time 0.5"


def test_a_resume_drops_later_and_truncated_lines(tmp_path):
    track(tmp_path, steps=(1, 2, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    track(tmp_path, start=2, steps=(3, 4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_sync_merges_offline_parts_into_one_run(at, tmp_path, capsys, console):
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
    images = dict(run.curve("samples/stage2"))
    assert images.keys() == {2, 4}
    assert images[2]["caption"] == "step 2: black"
    assert any(file.startswith("media/images/samples/stage2_2") for file in run.files)


@pytest.mark.slow
def test_online_runs_are_resumed_and_alert(at, tmp_path, capsys, console):
    with WandbServer() as server:
        at(server.url, WANDB_PROJECT="digits")
        with pytest.raises(SkippedStepsError):
            fail(tmp_path)
        track(tmp_path, "tracking.wandb=true", start=2, steps=(3,))
        [run] = server.runs.values()
    assert [step for step, _ in run.curve("train/loss")] == [1, 2, 3]
    assert run.alerts == ["Steps are skipped", "Run is stopping", "Steps keep being skipped"]
    assert f"wandb: {server.url}" in capsys.readouterr().err


def fail(folder):
    with Tracker(folder, load_config(None, ["tracking.wandb=true"]), start=0, total=9) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.log(2, {"train/loss": 1.0, "train/skipped": 1})
        tracker.mark_preempting(2, "SIGTERM")
        raise SkippedStepsError(2, 1, 0)


HANGS = """
import sys, time
from pathlib import Path
from rae_xla.config import load_config
from rae_xla.train.tracking.tracker import Tracker
from rae_xla.train.callbacks.watchdog import DATA, Watchdog

folder, config = Path(sys.argv[1]), load_config(None, overrides=["tracking.wandb=true"])
with Watchdog(1, folder) as watchdog, Tracker(folder, config, start=0, total=9) as tracker:
    watchdog.on_hang = tracker.report_hang
    tracker.log(1, {"train/loss": 1.0})
    watchdog.begin(DATA, 1)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_the_report_of_a_hang_arrives_after_the_process_ended(at, tmp_path):
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
        assert run.alerts == ["Run hangs"]
        wait_until(lambda: run.curve("train/loss") == [(1, 1.0)])


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["refuses", "broken", "hangs"])
def test_without_a_server_the_run_is_recorded_offline(failure, at, tmp_path, capsys, console):
    with WandbServer(failure) as server:
        at("http://127.0.0.1:9" if failure == "refuses" else server.url)
        track(tmp_path, "tracking.wandb=true")
        said = capsys.readouterr().err
        assert said.count("the run is recorded offline") == 1
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        assert server.runs == {}
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_an_invalid_key_is_reported_and_the_run_recorded_offline(at, tmp_path, capsys, console):
    with WandbServer() as server:
        at(server.url, WANDB_API_KEY="not a key")
        track(tmp_path, "tracking.wandb=true")
    assert "the run is recorded offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_requests_that_exceed_the_queue_are_dropped_and_counted(at, tmp_path, caplog):
    at("http://127.0.0.1:9", WANDB_MODE="disabled")
    sink = WandbSink(tmp_path, load_config(None).tracking, {})
    for step in range(3 * QUEUE_SIZE):  # while it starts
        sink.send("log", step=step, metrics={"train/loss": 0.5})
    assert sink.dropped >= QUEUE_SIZE / 2
    sink.close(0)
    assert len([line for line in caplog.messages if "too slow" in line]) == 1
    assert f"wandb: {sink.dropped} messages did not reach it" in caplog.messages[-1]


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


def test_metric_names_are_listed():
    assert {metric.name.split("/")[0] for metric in METRICS} == set(METRIC_GROUPS)
    assert (
        unknown_names(["train/loss", "train/disc/loss", "eval/model/psnr", "opt/disc_lr_1"]) == []
    )
    wrong = ["epoch", "disc/loss", "train/los", "perf/steptime", "checkpoint/seconds"]
    assert unknown_names(wrong) == wrong


def test_the_table_in_the_docs_is_up_to_date():
    assert markdown_table() in (ROOT / "docs/monitoring.md").read_text()
