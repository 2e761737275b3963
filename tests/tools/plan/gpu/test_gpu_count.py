"""The count of a step on fake tensors equals that of the same step on real ones.

The real step has real weights, and on several processes real communication over gloo.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from counted_step import count_real_step

from rae_xla import load_config
from rae_xla.tools.plan.gpu.count import count_step
from rae_xla.tools.plan.gpu.step_count import StepCount
from rae_xla.tools.plan.networks import without_weights

pytestmark = pytest.mark.slow

ROWS = 8
WIDE = ("stage_2.params.hidden_size=[64,96]", "stage_2.params.depth=[3,1]")


def fake_count(file: Path, task: str, gpus: int, *overrides: str) -> StepCount:
    config = load_config(file, overrides=list(overrides))
    config, _ = without_weights(config, file.parent / "encoder")
    return count_step(config, task, gpus, ROWS)


def assert_equal_counts(fake: StepCount, real: StepCount) -> None:
    assert fake.peak == pytest.approx(real.peak, rel=0.1)
    assert fake.flops == pytest.approx(real.flops, rel=0.01)
    for kind in ("parameters", "optimizer", "ema", "gradients", "batch"):
        assert fake.state.get(kind) == real.state.get(kind), kind
    assert {(s.kind, tuple(s.ranks)): (s.count, s.num_bytes) for s in fake.sent} == {
        (s.kind, tuple(s.ranks)): (s.count, s.num_bytes) for s in real.sent
    }


@pytest.mark.parametrize(
    "settings",
    [
        ("runtime.precision=bf16",),
        ("runtime.precision=bf16", "runtime.remat=1"),
        ("training.grad_accum_steps=2",),
    ],
    ids=" ".join,
)
def test_a_step_of_stage_2(tmp_path, settings):
    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    settings = ("data.train=null", *WIDE, *settings)
    real = count_real_step(file, "stage2", ROWS, list(settings))
    fake = fake_count(file, "stage2", 1, *settings)
    assert_equal_counts(fake, real)
    assert fake.phase == "flow matching"


def test_many_micro_batches_are_counted_by_two_and_three(tmp_path):
    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    batch = ("training.grad_accum_steps=5", f"training.global_batch_size={5 * ROWS}")
    settings = ("data.train=null", *WIDE, "runtime.precision=bf16", *batch)
    real = count_real_step(file, "stage2", ROWS, list(settings))
    fake = fake_count(file, "stage2", 1, *settings)
    assert_equal_counts(fake, real)
    assert fake.operations == real.operations


@pytest.mark.nightly  # compiling takes a minute
def test_a_compiled_step(tmp_path):
    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    settings = ("data.train=null", *WIDE, "runtime.precision=bf16", "runtime.compile=true")
    real = count_real_step(file, "stage2", ROWS, list(settings))
    fake = fake_count(file, "stage2", 1, *settings)
    assert_equal_counts(fake, real)


def test_a_step_of_stage_1_with_all_losses(tmp_path):
    file = tiny.make_gan_config(tmp_path, "no/such/shards")
    settings = ("data.train=null", "data.image_size=32", "runtime.precision=bf16")
    real = count_real_step(file, "stage1", ROWS, list(settings))
    fake = fake_count(file, "stage1", 1, *settings)
    assert_equal_counts(fake, real)
    assert fake.phase == "L1 + LPIPS + GAN, with discriminator updates"


@pytest.mark.parametrize(
    "settings",
    [
        ("mesh.ici.fsdp=2",),
        pytest.param(("mesh.ici.data=2", "mesh.ici.fsdp=1"), marks=pytest.mark.nightly),
    ],
)
def test_a_step_on_two_processes(tmp_path, settings):
    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    settings = ("data.train=null", *WIDE, "runtime.precision=bf16", *settings)
    helper = Path(tiny.__file__).with_name("counted_step.py")
    out = tmp_path / "count.json"
    arguments = [str(file), "stage2", "2", str(ROWS), str(out), *settings]
    subprocess.run(
        [sys.executable, str(helper), *arguments], check=True, env=tiny.environment(), timeout=300
    )
    real = StepCount.from_json(json.loads(out.read_text()))
    fake = fake_count(file, "stage2", 2, *settings)
    assert_equal_counts(fake, real)
    assert {sent.kind for sent in fake.sent} >= {"all-reduce"}


def test_memory_grows_with_the_images(tmp_path):
    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    config, _ = without_weights(load_config(file, overrides=["data.train=null"]), tmp_path / "e")
    small, middle, large = (count_step(config, "stage2", 1, rows) for rows in (64, 128, 192))
    assert small.state["parameters"] == large.state["parameters"]
    assert large.peak - middle.peak == pytest.approx(middle.peak - small.peak, rel=0.02)
