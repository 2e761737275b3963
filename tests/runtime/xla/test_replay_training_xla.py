"""A training whose steps are replayed has every bit of one whose steps are traced."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from replayed_training import compare, describe_program
from tiny import environment

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.runtime import start

pytestmark = pytest.mark.xla

CAPTURES = 2 * 2 + 2 * 2  # traced calls of the step, before and after the rollback, and previews


@pytest.fixture(scope="module")
def backend():
    return start(RuntimeConfig(backend="xla", devices=4), MeshConfig())


def in_another_process(devices, function, number, **variables):
    script = Path(__file__).parents[2] / "helpers" / "replayed_training.py"
    done = subprocess.run(
        [sys.executable, script, str(devices), function, str(number)],
        env=environment() | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found, steps):
    """The step is compiled once, also over a rollback; nothing is read within it."""
    assert found["different"] == []
    assert found["compared"] > 3 * steps
    assert found["replays"] >= steps - CAPTURES
    assert (found["compilations"], found["reads"], found["skipped"]) == (1, 0, 1)
    assert found["fallbacks"] == {}


def test_every_bit_is_that_of_traced_steps(backend):
    check(compare(backend, 10), 10)


@pytest.mark.slow
def test_processes_with_other_data_have_the_same_program(backend):
    """As the hosts of a pod, which must run the same program on the same inputs."""
    other = in_another_process(4, "describe", 3, PYTHONHASHSEED="7")
    own = describe_program(backend, 5)
    assert own == other
    assert len(own) > 100


@pytest.mark.nightly
@pytest.mark.parametrize("devices", [1, 4])
def test_fifty_steps(devices):
    check(in_another_process(devices, "compare", 50), 50)
