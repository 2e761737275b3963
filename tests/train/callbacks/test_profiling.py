"""Profiles of configured steps, and of the next steps after a signal."""

import json
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import one_process
from tiny import make_configs, make_shards, metrics, rae_xla

from rae_xla.train.callbacks.profiling import STEPS_ON_SIGNAL, ProfilingCallback


@pytest.fixture
def backend():
    return one_process()


class Run:
    """A trainer whose steps record their number in the trace."""

    def __init__(self, backend, folder, steps):
        self.folder, self.pauses = folder, 0
        self.callback = ProfilingCallback(backend, folder, steps)
        self.trainer = SimpleNamespace(
            state=SimpleNamespace(step=0), window=SimpleNamespace(pause=self.pause)
        )

    def __enter__(self):
        self.callback.on_train_start(self.trainer)
        return self

    def __exit__(self, *_):
        self.callback.close(None)

    @contextmanager
    def pause(self):
        self.pauses += 1
        yield

    def steps(self, first, last):
        for number in range(first, last + 1):
            self.trainer.state.step = number - 1
            self.callback.on_step_start(self.trainer)
            with torch.profiler.record_function(f"step-{number}"):
                torch.ones(3).sum()

    def traced(self, name):
        """Return the numbers of the steps in a trace."""
        [file] = (self.folder / "profile" / name).iterdir()
        events = json.loads(file.read_text())["traceEvents"]
        names = {event.get("name", "") for event in events}
        return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-"))


def test_configured_steps_are_recorded(backend, tmp_path, caplog):
    caplog.set_level("INFO")
    with Run(backend, tmp_path, (3, 4)) as run:
        run.steps(1, 6)
    assert run.traced("steps-3-4") == [3, 4]
    assert run.pauses == 2
    assert caplog.messages[0] == "step 2: profiling up to step 4"
    assert f"tensorboard --logdir {tmp_path}/profile/steps-3-4" in caplog.messages[1]


def test_a_run_that_starts_or_ends_within_the_range_records_its_steps(backend, tmp_path):
    with Run(backend, tmp_path, (3, 9)) as run:
        run.steps(5, 6)
    assert run.traced("steps-5-9") == [5, 6]


def test_every_signal_records_the_next_steps(backend, tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    with Run(backend, tmp_path, None) as run:
        run.steps(1, 2)
        os.kill(os.getpid(), signal.SIGUSR2)
        run.steps(3, 10)
        os.kill(os.getpid(), signal.SIGUSR2)
        run.steps(11, 11 + STEPS_ON_SIGNAL)
    assert run.traced("steps-3-7") == [3, 4, 5, 6, 7]
    assert run.traced("steps-11-15") == [11, 12, 13, 14, 15]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_other_processes_record_only_after_their_own_signal(backend, tmp_path):
    backend.process_index = 1
    with Run(backend, tmp_path, (1, 2)) as run:
        run.steps(1, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_fails_does_not_end_the_run(backend, tmp_path, caplog):
    (tmp_path / "profile").touch()  # a file where the folder should be
    with Run(backend, tmp_path, (2, 3)) as run:
        run.steps(1, 6)
    assert len([m for m in caplog.messages if m.startswith("no profile could be recorded")]) == 1


@pytest.mark.slow
def test_training_with_a_profile(tmp_path):
    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]
    results = tmp_path / "results"
    done = rae_xla("train", "stage2", "--config", config, "--results-dir", results,
                   "training.profile_steps=[3,4]", "training.steps=6")  # fmt: skip
    assert done.returncode == 0, done.stderr
    [file] = (results / "profile" / "steps-3-4").iterdir()
    assert json.loads(file.read_text())["traceEvents"]
    assert "tensorboard --logdir" in done.stderr
    lines = metrics(results)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1].keys() >= {
        "perf/step_time", "perf/host_time", "perf/data_wait", "perf/paused",
        "perf/images_per_second", "perf/images_per_second_per_chip", "perf/host_memory_gb",
        "perf/compilations", "perf/captures", "perf/fallbacks",
    }  # fmt: skip
    assert lines[2]["perf/paused"] >= 0
