"""Figures of a window: means of what is finite, sums of what was skipped, skips in a row."""

from types import SimpleNamespace

import pytest
import torch

from rae_xla.train.plan import Plan
from rae_xla.train.window import Windows

NAN = float("nan")


def windows():
    runtime = SimpleNamespace(
        synchronize=lambda: None, compilations=lambda: 3, fallbacks=dict, fetch=list
    )
    plan = Plan(100, per_epoch=5, global_batch=8, log_every=1, sample_every=0,
                checkpoint_every=0, eval_every=0)  # fmt: skip
    return Windows(plan, runtime)


def step(*names):
    return SimpleNamespace(names=names)


def test_means_are_over_the_steps_that_have_a_finite_number():
    found, plain, gan = windows(), step("train/loss"), step("train/loss", "disc/loss")
    for which, values in ((plain, [1.0]), (gan, [2.0, 7.0]), (gan, [NAN, 9.0])):
        found.add(which, torch.tensor(values))
    found.close(10, {"opt/lr": 0.1})
    window = found.take()
    assert window.step == 10
    assert window.figures["train/loss"] == 1.5
    assert window.figures["disc/loss"] == 8.0
    assert window.figures["epoch"] == 2.0
    assert window.figures["opt/lr"] == 0.1
    assert found.take() is None


def test_skips_are_summed_and_counted_in_a_row_over_windows():
    found, both = windows(), step("train/loss", "train/skipped", "disc/skipped")

    def window(*skips):
        for decoder, disc in skips:
            found.add(both, torch.tensor([NAN if decoder else 1.0, decoder, disc]))
        found.close(1, {})
        return found.take()

    first = window((0, 0), (1, 0), (0, 1))
    assert first.figures["train/skipped"] == 1
    assert first.figures["disc/skipped"] == 1
    assert first.skipped_in_a_row == 2
    assert window((1, 1), (0, 0)).skipped_in_a_row == 3
    assert window((0, 0), (1, 0)).skipped_in_a_row == 1
    found.add(both, torch.tensor([1.0, 0.0, 0.0]))
    assert found.skipped_up_to_now() == 0
    found.close(1, {})
    found.add(both, torch.tensor([NAN, 1.0, 0.0]))
    assert found.skipped_up_to_now() == 1, "of a window that was not taken yet, and after it"
    assert found.take().skipped_in_a_row == 0
    last = window((1, 0), (1, 0))
    assert last.skipped_in_a_row == 3
    assert "train/loss" not in last.figures


def test_figures_of_skipped_steps_count_for_nothing():
    found, gan = windows(), step("train/l1", "train/skipped", "disc/accuracy", "disc/skipped")
    for values in ([0.5, 0, 0.6, 0], [0.1, 0, 0.0, 1]):  # a comparison with NaN gives 0
        found.add(gan, torch.tensor(values))
    found.close(2, {})
    figures = found.take().figures
    assert figures["disc/accuracy"] == pytest.approx(0.6)
    assert figures["train/l1"] == pytest.approx(0.3)
