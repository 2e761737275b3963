"""Checks of a TPU host, with a folder in place of /dev and real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae_xla.tools.doctor import tpu_host

HOLD = "import sys, signal; chip = open(sys.argv[1]); print('held', flush=True); signal.pause()"
PROCESSES = Path("/proc")

pytestmark = pytest.mark.skipif(not PROCESSES.exists(), reason="needs Linux")


@pytest.fixture
def chips(tmp_path):
    for name in ("accel0", "accel1", "vfio/0", "vfio/vfio", "accel", "other0"):
        (tmp_path / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev" / name).touch()
    return tpu_host.tpu_chips(tmp_path / "dev")


def findings(chips, lock):
    return list(tpu_host.use_findings(chips, PROCESSES, lock))


def test_chips_are_found(chips):
    assert [chip.name for chip in chips] == ["accel0", "accel1", "0"]


def test_free_chips_pass(chips, tmp_path):
    with chips[0].open():  # this process does not count
        [finding] = findings(chips, tmp_path / "lock")
    assert finding.status == "ok"
    (tmp_path / "lock").touch()  # libtpu leaves it behind
    [finding] = findings(chips, tmp_path / "lock")
    assert finding.status == "ok"


def test_a_process_that_holds_a_chip_is_named(chips, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, chips[1]], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        [finding] = findings(chips, tmp_path / "lock")
    finally:
        holder.kill()
        holder.wait()
    assert finding.status == "FAIL"
    assert f"process {holder.pid} of " in finding.text
    assert finding.text.endswith(f"holds {chips[1]}")
    assert f"`kill {holder.pid}`" in finding.fix
    assert "infra/stop.sh --force" in finding.fix


def test_a_lock_file_of_another_user_is_named(chips, tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    [finding] = findings(chips, lock)
    assert (finding.name, finding.status) == ("lock file", "FAIL")
    assert f"sudo rm {lock}" in finding.fix


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ("[always] madvise never", "ok"),
        ("always [madvise] never", "warn"),
        ("always madvise [never]", "warn"),
        (None, "none"),
    ],
)
def test_huge_pages(tmp_path, content, status):
    setting = tmp_path / "enabled"
    if content is not None:
        setting.write_text(content + "\n")
    finding = tpu_host.huge_pages_finding(setting)
    assert finding.status == status
    if status == "warn":
        assert f"echo always > {setting}" in finding.fix


def test_a_machine_without_tpus_has_nothing_to_check(monkeypatch):
    monkeypatch.setattr(tpu_host, "tpu_chips", lambda folder: [])
    [finding] = tpu_host.check_tpu_host(None)
    assert finding.status == "none"
