"""Processes that do the heavy parts of a plan, watched: their memory, their time, their words."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rae_xla.errors import UserError

GB = 1e9
_POLL = 0.2  # seconds
_LAST_WORDS = 15  # lines
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(UserError):
    """A process was ended, or ended by itself, without its result."""


@dataclass(frozen=True)
class Limits:
    """What a process may take.

    Attributes:
        memory: bytes of this machine's memory.
        seconds: of its life.
    """

    memory: float
    seconds: float


def free_memory() -> float:
    """Bytes this machine has left, all but a tenth of them; infinite where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 0.9 * 1024 * kilobytes


def run_module(
    module: str,
    argument: str,
    limits: Limits,
    environment: Mapping[str, str],
    progress: Callable[[float, float], None],
) -> None:
    """Run ``python -m module argument`` to its end.

    Args:
        module: of this package.
        argument: its only one.
        limits: beyond which it is killed.
        environment: variables to set beside this process's own.
        progress: told seconds and bytes of memory so far, several times a second.

    Raises:
        UserError: what the process itself said was wrong with its input.
        WorkerError: it went beyond a limit or died; with the end of what it said.
    """
    # None of these: it is the module that chooses the device.
    kept = {k: v for k, v in os.environ.items() if k not in ("CPU_NUM_DEVICES", "PJRT_DEVICE")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module, argument],
            env=kept | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        start, most = time.monotonic(), 0.0
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                memory, seconds = _memory_of(process.pid), time.monotonic() - start
                most = max(most, memory)
                progress(seconds, memory)
                if memory > limits.memory:
                    raise WorkerError(
                        f"{module} took more than {limits.memory / GB:.1f} GB of this machine's "
                        "memory and was stopped: give it more with --max-memory (GB), or try "
                        "--effort fast"
                    )
                if seconds > limits.seconds:
                    raise WorkerError(
                        f"{module} took longer than {limits.seconds:.0f} s and was stopped: give "
                        "it more with --timeout (seconds), or try --effort fast"
                    )
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode != 0:
            said.seek(0)
            _complain(module, process.returncode, said.read())


def end_with_parent() -> None:
    """Said by such a process: kill it when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _complain(module: str, status: int, said: str) -> None:
    marker = f"{UserError.__module__}.{UserError.__name__}: "
    lines = said.strip().splitlines()
    for line in reversed(lines):
        if line.startswith(marker):
            raise UserError(line.removeprefix(marker))
    ending = "\n".join(lines[-_LAST_WORDS:])
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    raise WorkerError(f"{module} ended {how}:\n{ending}")


def _memory_of(pid: int) -> float:
    """Resident bytes of a process; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
