"""Checks of devices, mesh, batch, and the clocks of several hosts."""

import threading
import time
from types import SimpleNamespace

import pytest
from thread_processes import run_in_threads

from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.runtime.accelerators import Accelerator
from rae_xla.tools.doctor import devices
from rae_xla.tools.doctor.finding import DoctorContext


def make_context(*overrides):
    config = load_config(None, overrides=["runtime.backend=torch", *overrides])
    return DoctorContext(config, True, None)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_devices_batch_and_speed_are_reported():
    context = make_context("training.global_batch_size=6")
    found = by_name(devices.check_devices(context))
    assert found["batch"].text == "6 images per step, 6 per device and pass"
    assert "torch: " in found["backend"].text
    speed = by_name(devices.check_speed(context))
    assert speed["matmul"].status == "ok"
    assert "FLOP/s" in speed["matmul"].text
    assert speed["all-reduce"].status == "none"
    assert [f.status for f in devices.check_clocks(context)] == ["none"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.global_batch_size=6", "mesh.ici.fsdp=3"], "mesh"),
        (["training.global_batch_size=6", "training.grad_accum_steps=4"], "grad_accum_steps"),
        ([], "global_batch_size is missing"),
    ],
)
def test_a_mesh_or_batch_that_does_not_fit_is_an_error(settings, message):
    with pytest.raises(UserError, match=message):
        list(devices.check_devices(make_context(*settings)))


def test_without_a_backend_nothing_is_timed():
    assert [f.status for f in devices.check_speed(make_context())] == ["none"]


@pytest.mark.parametrize(("fraction", "status"), [(0.7, "ok"), (0.1, "warn")])
def test_an_accelerator_far_below_its_peak_is_a_warning(monkeypatch, fraction, status):
    monkeypatch.setattr(devices, "matmul_speed", lambda backend, size: fraction * 1e15)
    monkeypatch.setattr(devices, "all_reduce_speed", lambda backend, size: 2e11)
    context = make_context()
    context.backend = SimpleNamespace(accelerator=lambda: Accelerator("fast", 1e15, 10**9))
    found = by_name(devices.check_speed(context))
    assert found["matmul"].status == status
    assert f"{fraction:.0%} of the peak" in found["matmul"].text
    assert found["all-reduce"].text == "200 GB/s per device"


@pytest.mark.parametrize(("offset", "status"), [(0.0, "ok"), (-90.0, "warn")])
def test_a_host_with_a_wrong_clock_is_a_warning(monkeypatch, offset, status):
    of_thread, clock = threading.local(), time.time
    monkeypatch.setattr(devices, "time", SimpleNamespace(time=lambda: clock() + of_thread.offset))

    def process(backend):
        of_thread.offset = offset if backend.process_index == 1 else 0.0
        context = make_context()
        context.backend = backend
        [finding] = devices.check_clocks(context)
        return finding

    findings = run_in_threads(3, process)
    assert {finding.status for finding in findings} == {status}
    if status == "warn":
        assert "timedatectl" in findings[0].fix
        assert any(seconds in findings[0].text for seconds in ("89.", "90."))
