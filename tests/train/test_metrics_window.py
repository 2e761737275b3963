"""Metrics of a window: means of finite values, sums of skips, skips in a row, timing."""

import time
from types import SimpleNamespace

import pytest
import torch

from rae_xla.runtime.accelerators import Accelerator, Memory
from rae_xla.train.cadence import Cadence
from rae_xla.train.metrics_window import DeviceMetrics, MetricsWindow

NAN = float("nan")


def make_window(accelerator=None, memory=None, fetch_later=lambda result: lambda: result):
    backend = SimpleNamespace(
        synchronize=lambda: None, compilations=lambda: 3, captures=lambda: 0, fallbacks=dict,
        fetch_later=fetch_later,
        accelerator=lambda: accelerator, memory=lambda: memory, mesh=SimpleNamespace(size=4),
    )  # fmt: skip
    cadence = Cadence(100, per_epoch=5, global_batch=8, log_every=1, sample_every=0,
                      checkpoint_every=0, eval_every=0)  # fmt: skip
    return MetricsWindow(cadence, backend)


def step(*names):
    return SimpleNamespace(metric_names=names)


def test_means_are_over_steps_with_a_finite_value():
    collector, plain, gan = make_window(), step("train/loss"), step("train/loss", "train/disc/loss")
    for which, values in ((plain, [1.0]), (gan, [2.0, 7.0]), (gan, [NAN, 9.0])):
        collector.add(DeviceMetrics(which, torch.tensor(values)))
    collector.close(10, {"opt/lr": 0.1})
    window = collector.take()
    assert window.step == 10
    assert window.metrics["train/loss"] == 1.5
    assert window.metrics["train/disc/loss"] == 8.0
    assert window.metrics["train/epoch"] == 2.0
    assert window.metrics["opt/lr"] == 0.1
    assert collector.take() is None


def test_skips_are_summed_and_counted_in_a_row_over_make_window():
    collector, both = make_window(), step("train/loss", "train/skipped", "train/disc/skipped")

    def window(*skips):
        for decoder, disc in skips:
            collector.add(
                DeviceMetrics(both, torch.tensor([NAN if decoder else 1.0, decoder, disc]))
            )
        collector.close(1, {})
        return collector.take()

    first = window((0, 0), (1, 0), (0, 1))
    assert first.metrics["train/skipped"] == 1
    assert first.metrics["train/disc/skipped"] == 1
    assert first.skipped_in_a_row == 2
    assert window((1, 1), (0, 0)).skipped_in_a_row == 3
    assert window((0, 0), (1, 0)).skipped_in_a_row == 1
    collector.add(DeviceMetrics(both, torch.tensor([1.0, 0.0, 0.0])))
    assert collector.skipped_now() == 0
    collector.close(1, {})
    collector.add(DeviceMetrics(both, torch.tensor([NAN, 1.0, 0.0])))
    assert collector.skipped_now() == 1, (
        "counts a closed window that was not taken, and the steps after it"
    )
    assert collector.take().skipped_in_a_row == 0
    last = window((1, 0), (1, 0))
    assert last.skipped_in_a_row == 3
    assert "train/loss" not in last.metrics


def test_metrics_of_skipped_steps_are_ignored():
    collector, gan = (
        make_window(),
        step("train/l1", "train/skipped", "train/disc/accuracy", "train/disc/skipped"),
    )
    for values in ([0.5, 0, 0.6, 0], [0.1, 0, 0.0, 1]):  # comparing with NaN gives 0
        collector.add(DeviceMetrics(gan, torch.tensor(values)))
    collector.close(2, {})
    metrics = collector.take().metrics
    assert metrics["train/disc/accuracy"] == pytest.approx(0.6)
    assert metrics["train/l1"] == pytest.approx(0.3)


def test_at_most_two_steps_are_in_flight():
    asked, read = [], []

    def fetch_later(result):
        asked.append(int(result[0]))
        return lambda: read.append(int(result[0])) or result

    collector, plain = make_window(fetch_later=fetch_later), step("train/loss")
    for number in range(10):
        collector.add(DeviceMetrics(plain, torch.tensor([float(number)])))
        assert asked == list(range(number + 1))
        assert read == list(range(number - 1)), "waits for the oldest step and for none after it"
    collector.close(10, {})
    assert collector.take().metrics["train/loss"] == 4.5
    assert read == list(range(10)), "each is read once"


def test_time_is_split_into_host_data_and_devices():
    slept = 0.02

    def slow(seconds):
        time.sleep(seconds)
        return "batch"

    collector = make_window(fetch_later=lambda result: lambda: time.sleep(2 * slept) or result)
    plain = step("train/loss")
    feed = collector.timed_batches(slow(slept) for _ in range(4))
    for _ in range(4):
        assert next(feed) == "batch"
        time.sleep(3 * slept)
        collector.add(DeviceMetrics(plain, torch.tensor([1.0])))
    assert list(feed) == []
    with collector.pause():
        time.sleep(10 * slept)
    collector.close(4, {})
    metrics = collector.take().metrics
    # The first step compiles and is excluded: three are timed, and the first two of all were read.
    seconds = 3 * metrics["perf/step_time"]
    assert metrics["perf/paused"] >= 10 * slept
    assert metrics["perf/host_time"] >= 3 * slept
    assert metrics["perf/data_wait"] * seconds >= 3 * slept
    assert seconds >= 3 * metrics["perf/host_time"] + 3 * slept + 2 * 2 * slept
    rate = metrics["perf/images_per_second"]
    assert rate == pytest.approx(8 / metrics["perf/step_time"])
    assert metrics["perf/images_per_second_per_chip"] == pytest.approx(rate / 4)
    assert {"perf/mfu", "perf/memory_gb"}.isdisjoint(metrics), "the peak is unknown"


def test_utilisation_is_relative_to_the_peak_of_all_devices():
    accelerator = Accelerator("toy", peak_flops=1e6, hbm_bytes=10**9)
    collector, plain = (
        make_window(accelerator, Memory(used=2 * 10**9, peak=None, total=None)),
        step("train/loss"),
    )
    for flops in (1e9, 100.0, 300.0):  # the first compiles
        collector.add(DeviceMetrics(plain, torch.tensor([1.0]), flops))
    collector.close(3, {})
    metrics = collector.take().metrics
    seconds = 2 * metrics["perf/step_time"]
    assert metrics["perf/mfu"] == pytest.approx(8 * 400.0 / seconds / 4e6)
    assert metrics["perf/memory_gb"] == 2.0
    assert metrics["perf/host_memory_gb"] > 0.01
