"""The runs of docs/gpu.md fit their GPUs, as ``rae-xla plan --gpus`` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.tools.plan.gpu.cards import parse_gpus
from rae_xla.tools.plan.gpu.forecast import make_gpu_case

ROOT = Path(__file__).parents[4]
_SPEC = importlib.util.spec_from_file_location("gpu_memory", ROOT / "benchmarks/gpu_memory.py")
gpu_memory = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpu_memory)


def test_every_run_is_planned_for_every_machine():
    configs = {config for config, *_ in gpu_memory.RUNS}
    assert {Path(config).stem for config in configs} == {
        *("ditdh_s_256", "ditdh_s_512", "ditdh_xl_256", "ditdh_xl_512", "dinov2_b_256")
    }
    machines = {(config, gpus) for config, gpus, *_ in gpu_memory.RUNS}
    assert machines == {(c, g) for c in configs for g in ("1x4090", "1xh100", "8xh100")}


@pytest.mark.parametrize("run", gpu_memory.RUNS, ids=lambda run: f"{Path(run[0]).stem} {run[1]}")
def test_the_batch_divides(run, monkeypatch):
    config, gpus, remat, micro_batches = run
    monkeypatch.chdir(ROOT)
    loaded = load_config(config, gpu_memory.settings_of(remat, micro_batches))
    case = make_gpu_case(loaded, parse_gpus(gpus))
    assert case.rows * micro_batches * case.cluster.gpus == loaded.training.global_batch_size


@pytest.mark.nightly  # a row takes minutes
@pytest.mark.parametrize("run", gpu_memory.RUNS, ids=lambda run: f"{Path(run[0]).stem} {run[1]}")
def test_a_run_fits(run, monkeypatch):
    config, gpus, remat, micro_batches = run
    monkeypatch.chdir(ROOT)
    case, found = gpu_memory.count(config, gpus, gpu_memory.settings_of(remat, micro_batches))
    assert found.peak <= case.cluster.card.usable_bytes
