"""The metrics callback: when it warns that the devices wait for the host."""

from types import SimpleNamespace

import pytest

from rae_xla.train.callbacks.metrics import describe_slow_host
from rae_xla.train.metrics_window import WindowSummary


def summary(host, step):
    return WindowSummary(7, {"perf/host_time": host, "perf/step_time": step}, 0)


@pytest.mark.parametrize(
    ("name", "remedy"), [("xla", "runtime.replay=true"), ("torch", "runtime.compile=true")]
)
def test_a_host_that_limits_the_devices_is_reported_with_the_remedy(name, remedy):
    backend = SimpleNamespace(name=name, on_cpu=False)
    warning = describe_slow_host(summary(0.09, 0.1), backend)
    assert "step 7" in warning
    assert "90 of 100 ms" in warning
    assert remedy in warning
    assert describe_slow_host(summary(0.01, 0.1), backend) is None
    assert describe_slow_host(WindowSummary(7, {}, 0), backend) is None


@pytest.mark.parametrize("name", ["xla", "torch"])
def test_without_an_accelerator_the_host_is_the_device(name):
    backend = SimpleNamespace(name=name, on_cpu=True)
    assert describe_slow_host(summary(0.1, 0.1), backend) is None
