"""Captured functions: the numbers of traced ones, and never a stale one."""

import copy
import dataclasses
import gc
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rae_xla.config import MeshConfig, RunConfig, RuntimeConfig
from rae_xla.runtime import start

pytestmark = pytest.mark.xla

RULES = """
networks: [Small]
parameters:
  - {pattern: 'weight$', spec: [fsdp]}
"""


class Small(nn.Sequential):
    pass


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    rules = tmp_path_factory.mktemp("rules") / "small.yaml"
    rules.write_text(RULES)
    config = RunConfig(
        mesh=MeshConfig(sharding=("configs/sharding", str(rules))),
        runtime=RuntimeConfig(backend="xla", devices=4),
    )
    return start(config.runtime, config.mesh)


class Training:
    """A small model with momentum, an average and a counter, all updated in place."""

    def __init__(self, backend):
        torch.manual_seed(0)
        self.backend = backend
        self.model = backend.place(Small(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)))
        zeros = {name: torch.zeros(p.shape) for name, p in self.model.named_parameters()}
        self.momentum = backend.place_tensors(zeros, like=self.model)
        self.average = backend.place_tensors(zeros, like=self.model)
        self.count = backend.shard_batch({"count": torch.tensor(0.0)})["count"]

    def step(self, batch):
        scale = torch.linspace(0.5, 1.5, 8).to(batch["x"].device)  # a constant from the host
        loss = F.mse_loss(self.model(batch["x"]) * scale, batch["y"])
        loss.backward()
        parameters = list(self.model.parameters())
        with torch.no_grad():
            self.count.add_(1)
            momentum = list(self.momentum.values())
            torch._foreach_mul_(momentum, 0.9)
            torch._foreach_add_(momentum, [p.grad for p in parameters])
            torch._foreach_sub_(parameters, torch._foreach_mul(momentum, batch["lr"]))
            torch._foreach_lerp_(list(self.average.values()), parameters, 0.1)
        for parameter in parameters:
            parameter.grad = None
        return {"loss": loss.detach(), "count": self.count.clone()}

    def state(self):
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        state = {"p": parameters, "m": self.momentum, "a": self.average, "": {"n": self.count}}
        return self.backend.to_host(
            {f"{k}/{n}": t for k, of in state.items() for n, t in of.items()}
        )


def make_host_batch(number, rows=8, lr=0.1):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(2, rows, 8, generator=generator)
    return {"x": x, "y": y, "lr": torch.tensor(lr)}


def make_batch(backend, number, rows=8, lr=0.1):
    return backend.shard_batch(make_host_batch(number, rows, lr))


def traced(fn):
    """Compile a function for tracing at each call, as ``runtime.replay=false`` does."""
    from rae_xla.runtime.xla.replay import CapturedFunction, ReplayCounters

    return CapturedFunction(fn, ReplayCounters(), replay=False)


def counts(backend):
    return backend.replay_counters.captures, backend.replay_counters.replays


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_replayed_step_has_the_numbers_of_a_traced_one(backend):
    replayed, reference = Training(backend), Training(backend)
    step, traced_step = backend.compile(replayed.step), traced(reference.step)
    captures, replays = counts(backend)
    for number in range(10):
        settings = {"lr": 0.1 / (1 + number)}
        compilations = backend.compilations()
        found = step(make_batch(backend, number, **settings))
        assert backend.compilations() - compilations == (number == 0)
        expected = traced_step(make_batch(backend, number, **settings))
        assert equal(backend.to_host(found), backend.to_host(expected))
        if number % 3 == 0:  # as a preview or a checkpoint would read it
            assert equal(replayed.state(), reference.state())
    assert equal(replayed.state(), reference.state())
    assert counts(backend) == (captures + 2, replays + 8)
    assert backend.fallbacks() == {}


def test_shardings_are_kept_and_the_memory_of_the_state_is_reused(backend):
    from rae_xla.runtime.xla import compat

    training = Training(backend)
    step = backend.compile(training.step)
    weight = training.model[0].weight
    sharding = compat.sharding_text(weight)
    assert "devices=[4,1]" in sharding
    for number in range(3):
        step(make_batch(backend, number))
    backend.synchronize()
    _, before = compat.program_inputs([weight.detach() * 2])
    step(make_batch(backend, 3))
    backend.synchronize()
    assert compat.sharding_text(weight) == sharding
    assert torch.isfinite(backend.to_host({"w": weight})["w"]).all()
    held = [tensor for tensor in before if tensor.shape == weight.shape]
    assert held
    assert compat.tensor_handle(held[0]) is None


def test_changes_from_outside_are_seen(backend):
    replayed, reference = Training(backend), Training(backend)
    step, traced_step = backend.compile(replayed.step), traced(reference.step)
    for number in range(6):
        for training, compiled in ((replayed, step), (reference, traced_step)):
            compiled(make_batch(backend, number))
            if number == 3:  # in place, as a loaded state dict
                values = {n: torch.full(p.shape, 0.1) for n, p in training.model.named_parameters()}
                training.model.load_state_dict(values)
            if number == 4:  # another object
                with torch.no_grad():
                    training.model[2].bias = nn.Parameter(training.model[2].bias * 2)
        assert equal(replayed.state(), reference.state()), number


def test_a_new_shape_is_captured_and_a_known_one_is_replayed(backend):
    scale = torch.linspace(0, 1, 8)
    double = backend.compile(lambda batch: batch["x"] * scale.to(batch["x"].device))
    captures, replays = counts(backend)
    for rows in (8, 8, 8, 16, 16, 16, 8):
        batch = make_batch(backend, rows, rows=rows)
        expected = backend.to_host({"x": batch["x"]})["x"] * scale
        assert torch.equal(backend.to_host({"x": double(batch)})["x"], expected)
    assert counts(backend) == (captures + 4, replays + 3)


def test_a_result_may_be_an_argument_a_weight_or_no_tensor(backend):
    weight = make_batch(backend, 1)["x"]

    def several(x):
        return x, weight, {"twice": x + x, "again": (x + x).t().contiguous().t()}, 3, None

    captures, replays = counts(backend)
    compiled = backend.compile(several)
    for number in range(4):
        x = make_batch(backend, number)["x"]
        same, kept, sums, three, none = compiled(x)
        assert same is x
        assert kept is weight
        assert (three, none) == (3, None)
        [doubled, again, host] = backend.to_host({**sums, "x": x}).values()
        assert torch.equal(doubled, 2 * host)
        assert torch.equal(again, 2 * host)
    assert counts(backend) == (captures + 2, replays + 2)


def test_a_number_that_changes_from_call_to_call_is_never_stale(backend, caplog):
    numbers = iter(range(100))
    compiled = backend.compile(lambda x: x * 0 + next(numbers))
    x = make_batch(backend, 0)["x"]
    with caplog.at_level(logging.WARNING):
        for number in range(8):
            assert backend.to_host({"x": compiled(x)})["x"].eq(number).all()
    assert "traced at each call" in caplog.text


def test_random_numbers_of_the_device_are_drawn_in_each_call(backend, caplog):
    compiled = backend.compile(lambda x: x + torch.rand_like(x))
    x = make_batch(backend, 0)["x"]
    drawn = [backend.to_host({"x": compiled(x)})["x"] for _ in range(4)]
    assert "generator" in caplog.text
    for one, other in itertools.pairwise(drawn):
        assert not torch.equal(one, other)


def test_reading_a_value_inside_a_function_is_an_error(backend):
    compiled = backend.compile(lambda x: x * float(x.sum()))
    with pytest.raises(RuntimeError):
        compiled(make_batch(backend, 0)["x"])


def test_a_tensor_that_a_function_keeps_is_never_stale(backend, caplog):
    kept = {}

    def keep(x):
        kept["sum"] = x + 1
        return x * 2

    compiled = backend.compile(keep)
    for number in range(4):
        x = make_batch(backend, number)["x"]
        compiled(x)
        host = backend.to_host({"x": x, "sum": kept["sum"]})
        assert torch.equal(host["sum"], host["x"] + 1)
    assert "return it instead" in caplog.text


def test_a_gradient_that_a_function_leaves_is_reported(backend, caplog):
    training = Training(backend)

    def backward(batch):
        training.model.zero_grad()
        training.model(batch["x"]).sum().backward()
        return batch["x"].sum()

    compiled = backend.compile(backward)
    for number in range(3):
        compiled(make_batch(backend, number))
        assert torch.isfinite(backend.to_host({"g": training.model[0].weight.grad})["g"]).all()
    assert "gradient" in caplog.text


def test_a_call_that_is_captured_again_runs_the_same_program(backend):
    """So a host of a pod that captures again stays in step with those that replay."""
    training, reference = Training(backend), Training(backend)
    step, traced_step = backend.compile(training.step), traced(reference.step)
    again = backend.compile(training.step)  # knows no program yet
    compilations = []
    for number in range(5):
        (again if number in {2, 4} else step)(make_batch(backend, number))
        traced_step(make_batch(backend, number))
        compilations.append(backend.compilations())
    assert len(set(compilations)) == 1
    assert equal(training.state(), reference.state())
    [one], [other] = step._programs, again._programs
    assert one.equals(other)


def test_another_sharding_of_an_argument_is_captured(backend):
    """As after a change of the mesh or of the rules of a run."""
    host = torch.randn(8, 8)
    double = backend.compile(lambda x: x * 2 + x.sum())
    captures, replays = counts(backend)
    for spec in [("fsdp", None)] * 3 + [(None, "fsdp")] * 3 + [()] * 3 + [("fsdp", None)]:
        found = backend.to_host({"x": double(backend.send(host, spec))})["x"]
        torch.testing.assert_close(found, host * 2 + host.sum())
    assert counts(backend) == (captures + 6, replays + 4)


def test_weights_that_are_placed_by_other_rules_are_captured(backend):
    from rae_xla.runtime.xla import compat

    training = Training(backend)
    project = backend.compile(lambda batch: training.model(batch["x"]))
    batch = make_batch(backend, 0)
    results = [backend.to_host({"y": project(batch)})["y"] for _ in range(3)]
    captures, replays = counts(backend)
    host = backend.to_host(training.model.state_dict())
    on_host = Small(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    on_host.load_state_dict({name: 2 * tensor for name, tensor in host.items()})
    rules = backend._rules["Small"]
    backend._rules["Small"] = dataclasses.replace(rules, parameters=())  # replicates all
    try:
        training.model = backend.place(copy.deepcopy(on_host))
    finally:
        backend._rules["Small"] = rules
    gc.collect()  # the old model, whose layers refer to themselves
    assert "devices=" not in compat.sharding_text(training.model[0].weight)
    with torch.no_grad():
        expected = on_host(make_host_batch(0)["x"])
    for _ in range(3):
        found = backend.to_host({"y": project(batch)})["y"]
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, results[0])
    assert counts(backend) == (captures + 2, replays + 1)
