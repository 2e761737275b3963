"""Owner: which process holds a folder, and whether it is still running."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return what identifies this process: ``host``, ``pid`` and ``started``, as JSON values."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": process_started(pid)}


def is_on_this_host(owner: Mapping[str, Any]) -> bool:
    """Return whether it is known of an owner whether it runs: it is, or was, on this machine."""
    return owner.get("host") == socket.gethostname() and owner.get("started") is not None


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Return whether an owner is known to run: another process of this machine."""
    pid = owner.get("pid")
    if not is_on_this_host(owner) or pid == os.getpid() or not isinstance(pid, int):
        return False
    return process_started(pid) == owner["started"]


def process_started(pid: int) -> str | None:
    """Return when a process started, to distinguish it from a later one with the same number.

    None if it has ended, and where there is no ``/proc``.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, which may contain anything: field 3 is the state (Z: killed, and the parent
    # has not waited for it), field 22 the start in ticks since the boot. See proc(5).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
