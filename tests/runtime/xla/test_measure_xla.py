"""Speeds, delayed copies, profiles and the compilation cache of the XLA backend."""

import os
import subprocess
import sys

import pytest
import torch

from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed
from rae_xla.runtime.xla.compile_cache import open_cache

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def backend():
    config = load_config(None, overrides=["runtime.backend=xla", "runtime.devices=4"])
    return start(config.runtime, config.mesh)


def test_speeds(backend):
    assert matmul_speed(backend, 64) > 0
    assert all_reduce_speed(backend, 64) > 0
    assert backend.fallbacks() == {}
    assert (backend.accelerator(), backend.memory(), backend.warnings()) == (None, None, [])


def test_results_are_fetched_while_later_work_runs(backend):
    step = backend.compile(lambda x: (x @ x * 1e-2, x.sum()))
    x, first = step(backend.shard_batch({"x": torch.ones(4, 4)})["x"])
    later = backend.fetch_later(first)
    backend.fetch_later(step(x)[1])
    assert later().item() == 16.0


def test_a_profile_is_in_tensorboards_format(backend, tmp_path):
    with backend.profile(tmp_path / "profile"):
        matmul_speed(backend, 64)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert trace.relative_to(tmp_path / "profile").parts[:2] == ("plugins", "profile")


CACHED = """
import sys, torch
from rae_xla.config import load_config
from rae_xla.runtime import start
cache = f"runtime.compile_cache={sys.argv[1]}"
config = load_config(None, overrides=["runtime.backend=xla", cache])
backend = start(config.runtime, config.mesh)
double = backend.compile(lambda x: x * 2)
assert double(backend.shard_batch({"x": torch.ones(4)})["x"]).cpu().sum().item() == 8
print(backend.compilations(), backend.warnings())
"""


@pytest.mark.slow
def test_a_cache_that_cannot_be_loaded_is_not_written_and_a_warning_is_given(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(tmp_path / "cache")],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert "runtime.compile_cache is ignored: torch_xla 2.9" in done.stdout
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_that_is_not_writable_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"runtime\.compile_cache: .*file/host-3 cannot be written"):
        open_cache(str(tmp_path / "file"), "host-3")
