"""Image sampler: rows and graphs that it computes, bit-identity, and progress."""

from functools import partial

import numpy as np
import pytest
import torch
from sampling_world import make_world

from rae_xla.config import load_config
from rae_xla.config.schema import MeshConfig, RuntimeConfig
from rae_xla.runtime import start
from rae_xla.sample.rows import rows_per_device
from rae_xla.sample.sampler import load_sampler

GUIDANCE = {
    "none": [],
    "cfg": ["guidance.scale=1.5"],
    "cfg in an interval": ["guidance.scale=1.5", "guidance.t_max=0.5"],
    "autoguidance": ["guidance.scale=1.5", "guidance.method=autoguidance"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def sampler_of(world, *overrides, **backend):
    config = load_config(str(world), overrides=list(overrides))
    settings = RuntimeConfig(backend="torch", **backend)
    return load_sampler(config, start(settings, MeshConfig()))


def count_rows(module, counted):
    module.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))


@pytest.mark.parametrize(
    ("guidance", "model", "guide"),
    [
        ("none", [32] * 4, []),
        ("cfg", [64] * 4, []),
        # only the last of the four times is in the interval
        ("cfg in an interval", [32, 32, 32, 64], []),
        ("autoguidance", [32] * 4, [32] * 4),
    ],
)
def test_guided_step_computes_only_the_branches_it_needs(world, guidance, model, guide):
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
def test_each_branch_is_one_graph_compiled_once(world, guidance, monkeypatch):
    # Dynamo creates the graphs; the compiler behind it does not change their number.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    sampler = sampler_of(world, *GUIDANCE[guidance], compile=True)
    before = sampler.backend.compilations()
    plain = sampler_of(world, *GUIDANCE[guidance])
    first = torch.arange(32, dtype=torch.int32)
    for batch in range(3):
        indices, labels = first + 32 * batch, first.long() % 4
        pixels = sampler(0, indices, labels)
        difference = pixels.astype(int) - plain(0, indices, labels)
        assert np.abs(difference).max() <= 1
        # noise, one step of each branch (model and guide in one graph), pixels
        branches = 2 if guidance == "cfg in an interval" else 1
        assert sampler.backend.compilations() - before == 2 + branches


def test_images_are_bit_identical_in_any_batch(world):
    sampler = sampler_of(world, *GUIDANCE["cfg"])
    labels = torch.arange(41) % 4
    complete = sampler(3, torch.arange(41, dtype=torch.int32), labels)
    some = torch.tensor([40, 3, 11], dtype=torch.int32)
    assert np.array_equal(sampler(3, some, labels[some.long()]), complete[some.numpy()])
    wanted = torch.tensor([True, False, True])
    generated = sampler.dispatch(3, some, labels[some.long()], wanted)()
    assert generated.indices.tolist() == [40, 11]
    assert np.array_equal(generated.pixels, complete[[40, 11]])


def test_progress_covers_all_rounds(world):
    sampler, calls = sampler_of(world), []
    sampler(
        0, torch.arange(40, dtype=torch.int32), torch.zeros(40, dtype=torch.long),
        lambda *steps: calls.append(steps),
    )  # fmt: skip
    assert calls == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("on_cpu", "batch", "tokens", "rows"),
    [(True, 1, 16, 32), (True, 50, 16, 32), (True, 50, 256, 1), (True, 50, 1024, 1),
     (False, 50, 16, 13), (False, 1, 256, 1)],
)  # fmt: skip
def test_rows_per_device_are_constant_on_a_cpu(on_cpu, batch, tokens, rows):
    from types import SimpleNamespace

    backend = SimpleNamespace(on_cpu=on_cpu, mesh=SimpleNamespace(batch_shards=4))
    assert rows_per_device(backend, batch, tokens=tokens) == rows
