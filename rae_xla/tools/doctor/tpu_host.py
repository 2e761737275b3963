"""Checks of a TPU host before libtpu starts: who holds the chips, and the size of memory pages."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rae_xla.tools.doctor.finding import DoctorContext, Finding

TPU_HOST = "TPU host"

LOCK_FILE = Path("/tmp/libtpu_lockfile")
"""libtpu locks this file while a process uses the chips; another user cannot open it."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

FREE = "`bash infra/stop.sh --force` ends it on all hosts of a pod"


@dataclass(frozen=True)
class Holder:
    """A process that has a chip open.

    Attributes:
        pid: of the process.
        user: who runs it.
        command: its command line.
        devices: the chips.
    """

    pid: int
    user: str
    command: str
    devices: tuple[str, ...]

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} ({self.command}) holds {', '.join(self.devices)}"


def check_tpu_host(context: DoctorContext) -> Iterator[Finding]:
    """Check that no process holds the chips, and that memory pages are large."""
    chips = tpu_chips(Path("/dev"))
    if not chips:
        yield Finding(TPU_HOST, "", "none", "no TPU")
        return
    yield from use_findings(chips, Path("/proc"), LOCK_FILE)
    yield huge_pages_finding(HUGE_PAGES)


def tpu_chips(devices: Path) -> list[Path]:
    """Return the device files of the chips: ``accelN`` up to TPU v4, ``vfio/N`` later."""
    return sorted([*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")])


def use_findings(chips: Iterable[Path], processes: Path, lock: Path) -> Iterator[Finding]:
    """Yield what holds the chips.

    Args:
        chips: device files.
        processes: the kernel's folder of processes.
        lock: lock file of libtpu.
    """
    found = list(holders(chips, processes))
    for holder in found:
        fix = f"{holder}, and libtpu will not start: wait for it, or `kill {holder.pid}`; {FREE}"
        yield Finding(TPU_HOST, "chips", "FAIL", str(holder), fix)
    owner = _owner(lock)
    if owner is not None and not os.access(lock, os.W_OK):
        text = f"{lock} belongs to {owner}"
        fix = f"{text}, so libtpu takes the chips for used: `sudo rm {lock}`, or {FREE}"
        yield Finding(TPU_HOST, "lock file", "FAIL", text, fix)
    elif not found:
        hidden = "" if os.geteuid() == 0 else " (of those that this user may inspect)"
        yield Finding(TPU_HOST, "chips", "ok", f"no process holds them{hidden}")


def holders(chips: Iterable[Path], processes: Path) -> Iterator[Holder]:
    """Yield the processes that have a chip open, except this one.

    Those of other users are visible to root only.
    """
    names = {str(chip) for chip in chips}
    for process in sorted(processes.glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(process.name) == os.getpid():
            continue
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        if opened := names & set(links):
            command = " ".join(part.decode(errors="replace") for part in arguments).strip()
            user = _owner(process) or "an unknown user"
            yield Holder(int(process.name), user, command[:80], tuple(sorted(opened)))


def _owner(path: Path) -> str | None:
    """Name or number of the owner of a file; None if there is no such file."""
    try:
        number = path.stat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def huge_pages_finding(setting: Path) -> Finding:
    """Return whether the kernel gives out huge pages without being asked.

    Without them, the start and the end of a program take longer on TPU v5e and newer (jax warns
    about it, too).
    """
    name = "transparent huge pages"
    try:
        modes = setting.read_text(encoding="ascii").split()
    except OSError:
        return Finding(TPU_HOST, name, "none", "this kernel has none")
    mode = next((m.strip("[]") for m in modes if m.startswith("[")), "unknown")
    if mode == "always":
        return Finding(TPU_HOST, name, "ok", mode)
    fix = (
        f"transparent huge pages are set to {mode}, so transfers to the chips and their start are "
        f"slower: sudo sh -c 'echo always > {setting}' on every host"
    )
    return Finding(TPU_HOST, name, "warn", mode, fix)
