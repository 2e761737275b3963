"""Post-hoc moving averages: profiles, stored averages, what they are combined to."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoint_cases import LinearTask, make_saver, one_process, save

from rae_xla.checkpoint.manager import Checkpoint, list_checkpoints, verify
from rae_xla.checkpoint.posthoc_ema import (
    AVERAGES_FILE,
    find_averages,
    list_reduced,
    reconstruct,
    retire,
    surplus_steps,
)
from rae_xla.checkpoint.power_profiles import combine, exponent, shares
from rae_xla.checkpoint.train_state import make_state, restore, state_tensors
from rae_xla.cli.main import main
from rae_xla.config import CheckpointConfig
from rae_xla.errors import UserError
from rae_xla.ops.updates import AdamWScalars
from rae_xla.train.ema import update_power_averages
from rae_xla.train.optimizers import AdamW

WIDTHS = (0.05, 0.10)


def task(seed=0):
    made = LinearTask(seed)
    made.average_widths = WIDTHS
    return made


def new_state(of):
    return make_state(of.model, one_process(), average_widths=WIDTHS)


def train(state, start, stop):
    """Take steps on random gradients; return the weights after each."""
    backend, weights = one_process(), []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(p.shape, generator=generator) + 0.5 for p in
                     state.model.parameters().values()]  # fmt: skip
        scalars = AdamWScalars(torch.tensor(0.02), torch.tensor(step), torch.tensor(True))
        AdamW((0.9, 0.95), 1e-8, 0.0).apply(state.model, gradients, scalars, backend)
        update_power_averages(state, torch.tensor(step, dtype=torch.int32), backend)
        weights.append({n: p.detach().clone() for n, p in state.model.parameters().items()})
        state.step += 1
    return weights


def direct(width, weights):
    """The average of a width, from the weights after every step."""
    steps = len(weights)
    profile = shares(width, steps, np.arange(steps + 1, dtype=np.float64))
    return {
        name: sum(p * w[name].double() for p, w in zip(profile, weights, strict=True))
        for name in weights[0]
    }


def largest_difference(found, expected):
    return max((found[n].double() - expected[n]).abs().max().item() for n in expected)


def test_profiles_have_their_width_and_sum():
    for width in (0.01, 0.05, 0.1, 0.28):
        steps = np.arange(20_001, dtype=np.float64)
        profile = shares(width, 20_000, steps)
        mean = (profile * steps[1:]).sum()
        deviation = np.sqrt((profile * (steps[1:] - mean) ** 2).sum())
        assert profile.sum() == pytest.approx(1)
        assert deviation / 20_000 == pytest.approx(width, rel=1e-3)
    # The paper's own numbers, of which the exponent is one more.
    assert exponent(0.05) == pytest.approx(16.97 + 1, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94 + 1, abs=0.01)


def test_tracked_averages_are_those_of_all_weights():
    state = new_state(task())
    weights = train(state, 0, 100)
    for width in WIDTHS:
        assert largest_difference(state.averages[width], direct(width, weights)) < 2e-6


def test_a_width_that_was_not_tracked_is_reconstructed(tmp_path):
    """Against the average of the weights after every step, from 8 stored pairs of averages."""
    of = task()
    state, weights = new_state(of), []
    for step in range(8, 65, 8):
        weights += train(state, step - 8, step)
        save(tmp_path, step, of, state)
    checkpoint = list_checkpoints(str(tmp_path))[-1]
    for width, error in ((0.07, 0.02), (0.15, 0.05), (0.05, 1e-9)):
        truth = direct(width, weights)
        found = reconstruct(checkpoint, width)
        assert found.error < error
        names = {name: found.state[f"published.{name}"] for name in truth}
        distance = largest_difference(names, truth)
        nearest = min(largest_difference(state.averages[w], truth) for w in WIDTHS)
        assert distance < 2e-6 if width in WIDTHS else distance < 0.05 * nearest


def test_a_long_run_needs_few_averages():
    stored = [(100_000 * i // 16, w) for i in range(1, 17) for w in WIDTHS]
    for width, error in ((0.04, 0.02), (0.07, 0.005), (0.15, 0.01)):
        assert combine(stored, 100_000, width).error < error
    assert combine([(10, 0.05)], 10, 0.07).coefficients == (1.0,)


def test_resuming_continues_the_averages(tmp_path):
    of = task()
    state = new_state(of)
    train(state, 0, 3)
    save(tmp_path, 3, of, state)
    train(state, 3, 5)
    other = task(seed=1)
    restored = restore(other, one_process(), Checkpoint(str(tmp_path / "step-00000003")))
    train(restored, 3, 5)
    before, after = state_tensors(of, state), state_tensors(other, restored)
    assert {"power_ema_0.05/published.0.weight", "power_ema_0.1/published.0.bias"} <= before.keys()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_skipped_by_a_rollback_count_with_unchanged_weights(tmp_path):
    of = task()
    state = new_state(of)
    weights = train(state, 0, 3)
    save(tmp_path, 3, of, state)
    other = task(seed=1)
    restored = restore(other, one_process(), Checkpoint(str(tmp_path / "step-00000003")), step=7)
    expected = direct(0.1, weights + weights[-1:] * 4)
    assert largest_difference(restored.averages[0.1], expected) < 1e-6


def test_averages_cannot_start_in_the_middle(tmp_path):
    checkpoint = save(tmp_path, 3)
    with pytest.raises(UserError, match=r"has no power_ema_0\.05, power_ema_0\.1, but"):
        restore(task(), one_process(), checkpoint)
    with pytest.raises(UserError, match="has no power-function averages: the run must track"):
        reconstruct(checkpoint, 0.07)


def test_old_checkpoints_are_reduced_within_the_budget(tmp_path):
    of = task()
    state = new_state(of)
    settings = replace(CheckpointConfig(), keep_last=1)
    saver = make_saver(tmp_path, of, state, settings, step=lambda: state.step)
    saver._keep_averages = 2
    for step in range(1, 6):
        train(state, step - 1, step)
        assert saver.finish(step, timeout=0), saver.failure
    assert [c.step for c in list_checkpoints(str(tmp_path))] == [5]
    reduced = list_reduced(str(tmp_path))
    assert [c.step for c in reduced] == [2, 4]
    assert sorted(p.name for p in (tmp_path / "step-00000004").iterdir()) == [
        ".metadata", AVERAGES_FILE, "power_ema_0.05-0.distcp", "power_ema_0.1-0.distcp",
    ]  # fmt: skip
    stored = find_averages(str(tmp_path), 5)
    assert [s.checkpoint.step for s in stored] == [2, 4, 5]
    for one in stored:
        verify(one.checkpoint, one.manifest)
    # The next save leaves them alone, and one of the same step replaces what is reduced.
    saver.finish(6, timeout=0)
    assert [c.step for c in list_reduced(str(tmp_path))] == [2, 5]


def test_an_interrupted_reduction_leaves_a_complete_checkpoint(tmp_path):
    of = task()
    state = new_state(of)
    train(state, 0, 1)
    checkpoint = save(tmp_path, 1, of, state)
    (tmp_path / "step-00000001" / AVERAGES_FILE).write_text("{}")
    assert list_checkpoints(str(tmp_path)) == [checkpoint]
    assert not list_reduced(str(tmp_path))
    assert retire(checkpoint.path)
    assert not list_checkpoints(str(tmp_path))
    content = json.loads((tmp_path / "step-00000001" / AVERAGES_FILE).read_text())
    assert set(content["files"]) == {
        ".metadata", "power_ema_0.05-0.distcp", "power_ema_0.1-0.distcp",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "keep", "dropped"),
    [
        ([1, 2, 3, 4], 4, []),
        ([10, 20, 30, 40, 50], 3, [10, 30]),
        ([10, 20, 21, 30], 3, [21]),
        ([5], 1, []),
    ],
)
def test_the_steps_that_remain_are_spread_evenly(steps, keep, dropped):
    assert sorted(surplus_steps(steps, keep)) == dropped


def test_command_writes_weights_that_other_commands_read(tmp_path, capsys):
    of = task()
    state = new_state(of)
    weights = train(state, 0, 1)
    save(tmp_path, 1, of, state)
    weights += train(state, 1, 4)
    checkpoint = save(tmp_path, 4, of, state)
    out = tmp_path / "average.pt"
    assert main(["checkpoints", "prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert "reduced to its averages" in capsys.readouterr().out
    assert main(["checkpoints", "ema", str(tmp_path), "--width", "0.1", "--out", str(out)]) == 0
    assert "from the averages of 2 steps; its profile is 0.00% off" in capsys.readouterr().out
    content = torch.load(out, weights_only=True)
    found = {n.removeprefix("published."): t for n, t in content["ema"].items()}
    assert largest_difference(found, direct(0.1, weights)) < 1e-6
    assert main(["checkpoints", "ema", str(tmp_path), "--width", "2", "--out", str(out)]) == 2
    assert "--width 2: expected a number of at least 0.005" in capsys.readouterr().err
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    assert "reduced to its averages, for `rae-xla checkpoints ema`" in capsys.readouterr().out
    assert main(["checkpoints", "verify", str(tmp_path)]) == 0
    assert "step-00000001: intact, 3 files" in capsys.readouterr().out
    broken = next((tmp_path / "step-00000001").glob("power*"))
    broken.write_bytes(b"x")
    assert main(["checkpoints", "ema", str(tmp_path), "--width", "0.1", "--out", str(out)]) == 2
    assert f"checkpoint {tmp_path / 'step-00000001'} is broken" in capsys.readouterr().err
    assert checkpoint.step == 4
