"""Devices, mesh and batch, and the clocks of several hosts."""

import threading
import time
from types import SimpleNamespace

import pytest

from rae_xla.config import load_config
from rae_xla.doctor import devices
from rae_xla.doctor.finding import Patient
from rae_xla.errors import UserError
from rae_xla.runtime.chips import Chip


def patient(*overrides):
    config = load_config(None, overrides=["runtime.backend=torch", *overrides])
    return Patient(config, True, None)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_devices_and_batch_and_speed():
    examined = patient("training.global_batch_size=6")
    found = by_name(devices.check_devices(examined))
    assert found["batch"].text == "6 images a step, 6 at a time on a device"
    assert "torch: " in found["backend"].text
    speed = by_name(devices.check_speed(examined))
    assert speed["matmul"].status == "ok"
    assert "FLOP/s" in speed["matmul"].text
    assert speed["all-reduce"].status == "none"
    assert [f.status for f in devices.check_clocks(examined)] == ["none"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.global_batch_size=6", "mesh.ici.fsdp=3"], "mesh"),
        (["training.global_batch_size=6", "training.grad_accum_steps=4"], "grad_accum_steps"),
        ([], "global_batch_size is missing"),
    ],
)
def test_a_mesh_or_batch_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        list(devices.check_devices(patient(*settings)))


def test_without_devices_nothing_is_timed():
    assert [f.status for f in devices.check_speed(patient())] == ["none"]


@pytest.mark.parametrize(("share", "status"), [(0.7, "ok"), (0.1, "warn")])
def test_a_chip_far_below_its_peak_is_told(monkeypatch, share, status):
    monkeypatch.setattr(devices, "matmul_speed", lambda runtime, size: share * 1e15)
    monkeypatch.setattr(devices, "all_reduce_speed", lambda runtime, size: 2e11)
    examined = patient()
    examined.runtime = SimpleNamespace(chip=lambda: Chip("fast", 1e15, 10**9))
    found = by_name(devices.check_speed(examined))
    assert found["matmul"].status == status
    assert f"{share:.0%} of the peak" in found["matmul"].text
    assert found["all-reduce"].text == "200 GB/s a device"


@pytest.mark.parametrize(("wrong_by", "status"), [(0.0, "ok"), (-90.0, "warn")])
def test_a_host_whose_clock_is_wrong_is_told(monkeypatch, wrong_by, status):
    from rae_xla.runtime.hosts import Hosts

    count, found, clock = 3, {}, time.time
    monkeypatch.setenv("MASTER_PORT", "23571")
    own = threading.local()
    monkeypatch.setattr(
        devices, "time", SimpleNamespace(time=lambda: clock() + getattr(own, "wrong", 0.0))
    )

    def host(index):
        own.wrong = wrong_by if index == 1 else 0.0
        hosts = Hosts(index, count)
        examined = patient()
        examined.runtime = SimpleNamespace(process_count=count, exchange=hosts.exchange)
        [found[index]] = devices.check_clocks(examined)

    threads = [threading.Thread(target=host, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {finding.status for finding in found.values()} == {status}
    if status == "warn":
        assert "timedatectl" in found[0].fix
        assert any(seconds in found[0].text for seconds in ("89.", "90."))
