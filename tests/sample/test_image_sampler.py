"""The sampler itself, in this process: what it computes and how often it compiles."""

from functools import partial

import numpy as np
import pytest
import torch
from sampling_world import make_world

from rae_xla.config import load_config
from rae_xla.config.sections import MeshConfig, RuntimeConfig
from rae_xla.runtime import start
from rae_xla.sample.generate import load_sampler
from rae_xla.sample.rows import rows_per_device

GUIDANCE = {
    "none": [],
    "cfg": ["guidance.scale=1.5"],
    "cfg in an interval": ["guidance.scale=1.5", "guidance.t_max=0.5"],
    "autoguidance": ["guidance.scale=1.5", "guidance.method=autoguidance"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def sampler_of(world, *overrides, **runtime):
    config = load_config(str(world), overrides=list(overrides))
    settings = RuntimeConfig(backend="torch", **runtime)
    return load_sampler(config, start(settings, MeshConfig()))


def count_rows(module, counted):
    module.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))


@pytest.mark.parametrize(
    ("guidance", "model", "guide"),
    [
        ("none", [32] * 4, []),
        ("cfg", [64] * 4, []),
        # of four times only the last is inside
        ("cfg in an interval", [32, 32, 32, 64], []),
        ("autoguidance", [32] * 4, [32] * 4),
    ],
)
def test_a_guided_step_costs_its_branches_and_no_more(world, guidance, model, guide):
    sampler = sampler_of(world, *GUIDANCE[guidance])
    rows, guide_rows = [], []
    count_rows(sampler._model, rows)
    if sampler._guide is not None:
        count_rows(sampler._guide, guide_rows)
    sampler(0, torch.arange(5, dtype=torch.int32), torch.zeros(5, dtype=torch.long))
    assert rows == model
    assert guide_rows == guide


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["cfg in an interval", "autoguidance"])
def test_every_branch_is_one_graph_and_compiled_for_the_first_batch_only(
    world, guidance, monkeypatch
):
    # Dynamo makes the graphs; what is done with them afterwards does not change their number.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    sampler = sampler_of(world, *GUIDANCE[guidance], compile=True)
    before = sampler.runtime.compilations()
    plain = sampler_of(world, *GUIDANCE[guidance])
    numbers = torch.arange(32, dtype=torch.int32)
    for batch in range(3):
        rows, labels = numbers + 32 * batch, numbers.long() % 4
        pixels = sampler(0, rows, labels)
        difference = pixels.astype(int) - plain(0, rows, labels)
        assert np.abs(difference).max() <= 1
        # noise, a step of each branch (model and guide together), pixels
        branches = 2 if guidance == "cfg in an interval" else 1
        assert sampler.runtime.compilations() - before == 2 + branches


def test_pictures_are_the_same_bits_in_any_order_and_company(world):
    sampler = sampler_of(world, *GUIDANCE["cfg"])
    labels = torch.arange(41) % 4
    whole = sampler(3, torch.arange(41, dtype=torch.int32), labels)
    some = torch.tensor([40, 3, 11], dtype=torch.int32)
    assert np.array_equal(sampler(3, some, labels[some.long()]), whole[some.numpy()])
    drawn = sampler.begin(3, some, labels[some.long()], torch.tensor([True, False, True]))()
    assert drawn.rows.tolist() == [40, 11]
    assert np.array_equal(drawn.pixels, whole[[40, 11]])


def test_progress_is_told_over_all_rounds(world):
    sampler, told = sampler_of(world), []
    sampler(
        0, torch.arange(40, dtype=torch.int32), torch.zeros(40, dtype=torch.long),
        lambda *steps: told.append(steps),
    )  # fmt: skip
    assert told == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("on_cpu", "batch", "tokens", "rows"),
    [(True, 1, 16, 32), (True, 50, 16, 32), (True, 50, 256, 1), (True, 50, 1024, 1),
     (False, 50, 16, 13), (False, 1, 256, 1)],
)  # fmt: skip
def test_a_cpu_always_works_on_equally_many(on_cpu, batch, tokens, rows):
    from types import SimpleNamespace

    runtime = SimpleNamespace(on_cpu=on_cpu, mesh=SimpleNamespace(batch_parts=4))
    assert rows_per_device(runtime, batch, tokens=tokens) == rows
