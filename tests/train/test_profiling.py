"""Profiles of chosen steps, and of the next ones after a signal."""

import json
import os
import signal
from contextlib import contextmanager

import pytest
import torch
from tiny import make_configs, make_shards, metrics, rae_xla

from rae_xla.config import MeshConfig
from rae_xla.runtime.torch import TorchRuntime
from rae_xla.train.profiling import ON_SIGNAL, Profiler


@pytest.fixture
def runtime():
    return TorchRuntime(mesh=MeshConfig(), precision="fp32", compile_graphs=False, seed=0)


class Run:
    """Steps that leave their number in a trace, and what was said."""

    def __init__(self, runtime, folder, steps):
        self.folder, self.said, self.pauses = folder, [], 0
        self.profiler = Profiler(runtime, folder, steps, self.pause, self.said.append)

    @contextmanager
    def pause(self):
        self.pauses += 1
        yield

    def steps(self, first, last):
        for number in range(first, last + 1):
            self.profiler.before(number)
            with torch.profiler.record_function(f"step-{number}"):
                torch.ones(3).sum()

    def traced(self, name):
        """The numbers of the steps in a trace."""
        [file] = (self.folder / "profile" / name).iterdir()
        events = json.loads(file.read_text())["traceEvents"]
        names = {event.get("name", "") for event in events}
        return sorted(int(n.removeprefix("step-")) for n in names if n.startswith("step-"))


def test_the_steps_that_were_asked_for_are_recorded(runtime, tmp_path):
    run = Run(runtime, tmp_path, (3, 4))
    with run.profiler:
        run.steps(1, 6)
    assert run.traced("steps-3-4") == [3, 4]
    assert run.pauses == 2
    assert run.said[0] == "step 2: profiling up to step 4"
    assert f"tensorboard --logdir {tmp_path}/profile/steps-3-4" in run.said[1]


def test_a_run_that_starts_in_the_middle_or_ends_there_records_what_it_can(runtime, tmp_path):
    run = Run(runtime, tmp_path, (3, 9))
    with run.profiler:
        run.steps(5, 6)
    assert run.traced("steps-5-9") == [5, 6]


def test_a_signal_has_the_next_steps_recorded_as_often_as_it_comes(runtime, tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    run = Run(runtime, tmp_path, None)
    with run.profiler:
        run.steps(1, 2)
        os.kill(os.getpid(), signal.SIGUSR2)
        run.steps(3, 10)
        os.kill(os.getpid(), signal.SIGUSR2)
        run.steps(11, 11 + ON_SIGNAL)
    assert run.traced("steps-3-7") == [3, 4, 5, 6, 7]
    assert run.traced("steps-11-15") == [11, 12, 13, 14, 15]
    assert signal.getsignal(signal.SIGUSR2) == before


def test_other_processes_record_on_their_signal_only(runtime, tmp_path):
    runtime.process_index = 1
    run = Run(runtime, tmp_path, (1, 2))
    with run.profiler:
        run.steps(1, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_made_ends_no_run(runtime, tmp_path):
    (tmp_path / "profile").touch()  # where its folder should be
    run = Run(runtime, tmp_path, (2, 3))
    with run.profiler:
        run.steps(1, 6)
    assert any(line.startswith("no profile: ") for line in run.said)
    assert len([line for line in run.said if "no profile" in line]) == 1


@pytest.mark.slow
def test_a_training_is_profiled(tmp_path):
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
        "perf/compilations", "perf/fallbacks",
    }  # fmt: skip
    assert lines[2]["perf/paused"] >= 0
