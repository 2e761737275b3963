"""What the XLA backend tells of itself, on four virtual devices: speeds, profiles, its cache."""

import os
import subprocess
import sys

import pytest
import torch

from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.runtime.compile_cache import open_cache
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def runtime():
    config = load_config(None, overrides=["runtime.backend=xla", "runtime.devices=4"])
    return start(config.runtime, config.mesh)


def test_every_device_multiplies_and_all_add_up(runtime):
    assert matmul_speed(runtime, 64) > 0
    assert all_reduce_speed(runtime, 64) > 0
    assert runtime.fallbacks() == {}
    assert (runtime.chip(), runtime.memory(), runtime.warnings()) == (None, None, [])


def test_results_are_fetched_while_what_came_after_them_is_computed(runtime):
    step = runtime.compile(lambda x: (x @ x * 1e-2, x.sum()))
    x, first = step(runtime.put({"x": torch.ones(4, 4)})["x"])
    later = runtime.fetch_later(first)
    runtime.fetch_later(step(x)[1])
    assert later().item() == 16.0


def test_a_profile_is_what_tensorboard_reads(runtime, tmp_path):
    with runtime.profile(tmp_path / "profile"):
        matmul_speed(runtime, 64)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert trace.relative_to(tmp_path / "profile").parts[:2] == ("plugins", "profile")


CACHED = """
import sys, torch
from rae_xla.config import load_config
from rae_xla.runtime import start
cache = f"runtime.compile_cache={sys.argv[1]}"
config = load_config(None, overrides=["runtime.backend=xla", cache])
runtime = start(config.runtime, config.mesh)
double = runtime.compile(lambda x: x * 2)
assert double(runtime.put({"x": torch.ones(4)})["x"]).cpu().sum().item() == 8
print(runtime.compilations(), runtime.warnings())
"""


@pytest.mark.slow
def test_compiled_programs_are_kept_by_host_and_a_start_that_cannot_load_them_says_so(tmp_path):
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(tmp_path / "cache")],
            capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."},
        )  # fmt: skip
        said.append(done.stdout.strip())
    assert list((tmp_path / "cache" / "host-0").iterdir()), "something was kept"
    assert said[0].endswith(" []")
    # Either the second start compiles nothing, or it says why it did.
    assert said[1] == "0 []" or "cannot load what it has written" in said[1]


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"runtime\.compile_cache: .*file/host-3 cannot be written"):
        open_cache(str(tmp_path / "file"), 3)
