"""Figures of a window: means of what is finite, sums of what was skipped, skips in a row."""

import time
from types import SimpleNamespace

import pytest
import torch

from rae_xla.runtime.chips import Chip, Memory
from rae_xla.train.plan import Plan
from rae_xla.train.window import Windows

NAN = float("nan")


def windows(chip=None, memory=None, fetch_later=lambda result: lambda: result):
    runtime = SimpleNamespace(
        synchronize=lambda: None, compilations=lambda: 3, fallbacks=dict, fetch_later=fetch_later,
        chip=lambda: chip, memory=lambda: memory, mesh=SimpleNamespace(size=4),
    )  # fmt: skip
    plan = Plan(100, per_epoch=5, global_batch=8, log_every=1, sample_every=0,
                checkpoint_every=0, eval_every=0)  # fmt: skip
    return Windows(plan, runtime)


def step(*names):
    return SimpleNamespace(names=names)


def test_means_are_over_the_steps_that_have_a_finite_number():
    found, plain, gan = windows(), step("train/loss"), step("train/loss", "train/disc/loss")
    for which, values in ((plain, [1.0]), (gan, [2.0, 7.0]), (gan, [NAN, 9.0])):
        found.add(which, torch.tensor(values))
    found.close(10, {"opt/lr": 0.1})
    window = found.take()
    assert window.step == 10
    assert window.figures["train/loss"] == 1.5
    assert window.figures["train/disc/loss"] == 8.0
    assert window.figures["train/epoch"] == 2.0
    assert window.figures["opt/lr"] == 0.1
    assert found.take() is None


def test_skips_are_summed_and_counted_in_a_row_over_windows():
    found, both = windows(), step("train/loss", "train/skipped", "train/disc/skipped")

    def window(*skips):
        for decoder, disc in skips:
            found.add(both, torch.tensor([NAN if decoder else 1.0, decoder, disc]))
        found.close(1, {})
        return found.take()

    first = window((0, 0), (1, 0), (0, 1))
    assert first.figures["train/skipped"] == 1
    assert first.figures["train/disc/skipped"] == 1
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
    found, gan = (
        windows(),
        step("train/l1", "train/skipped", "train/disc/accuracy", "train/disc/skipped"),
    )
    for values in ([0.5, 0, 0.6, 0], [0.1, 0, 0.0, 1]):  # a comparison with NaN gives 0
        found.add(gan, torch.tensor(values))
    found.close(2, {})
    figures = found.take().figures
    assert figures["train/disc/accuracy"] == pytest.approx(0.6)
    assert figures["train/l1"] == pytest.approx(0.3)


def test_no_more_than_two_steps_are_ahead_of_the_devices():
    asked, read = [], []

    def fetch_later(result):
        asked.append(int(result[0]))
        return lambda: read.append(int(result[0])) or result

    found, plain = windows(fetch_later=fetch_later), step("train/loss")
    for number in range(10):
        found.add(plain, torch.tensor([float(number)]))
        assert asked == list(range(number + 1))
        assert read == list(range(number - 1)), "the oldest is waited for, and none after it"
    found.close(10, {})
    assert found.take().figures["train/loss"] == 4.5
    assert read == list(range(10)), "each is read once"


def test_time_is_told_apart():
    slept = 0.02

    def slow(seconds):
        time.sleep(seconds)
        return "batch"

    found = windows(fetch_later=lambda result: lambda: time.sleep(2 * slept) or result)
    plain = step("train/loss")
    feed = found.waiting(slow(slept) for _ in range(4))
    for _ in range(4):
        assert next(feed) == "batch"
        time.sleep(3 * slept)
        found.add(plain, torch.tensor([1.0]))
    assert list(feed) == []
    with found.pause():
        time.sleep(10 * slept)
    found.close(4, {})
    figures = found.take().figures
    # the first step compiles and is left out: three are timed, and the first two of all were read
    seconds = 3 * figures["perf/step_time"]
    assert figures["perf/paused"] >= 10 * slept
    assert figures["perf/host_time"] >= 3 * slept
    assert figures["perf/data_wait"] * seconds >= 3 * slept
    assert seconds >= 3 * figures["perf/host_time"] + 3 * slept + 2 * 2 * slept
    rate = figures["perf/images_per_second"]
    assert rate == pytest.approx(8 / figures["perf/step_time"])
    assert figures["perf/images_per_second_per_chip"] == pytest.approx(rate / 4)
    assert {"perf/mfu", "perf/memory_gb"}.isdisjoint(figures), "where no peak is known"


def test_utilisation_is_against_the_peak_of_all_chips():
    chip = Chip("toy", peak_flops=1e6, hbm_bytes=10**9)
    found, plain = windows(chip, Memory(used=2 * 10**9, peak=None, total=None)), step("train/loss")
    for flops in (1e9, 100.0, 300.0):  # the first compiles
        found.add(plain, torch.tensor([1.0]), flops)
    found.close(3, {})
    figures = found.take().figures
    seconds = 2 * figures["perf/step_time"]
    assert figures["perf/mfu"] == pytest.approx(8 * 400.0 / seconds / 4e6)
    assert figures["perf/memory_gb"] == 2.0
    assert figures["perf/host_memory_gb"] > 0.01
