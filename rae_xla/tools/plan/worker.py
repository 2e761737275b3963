"""Worker processes of a plan, with limits on memory and time."""

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
from typing import NoReturn

from rae_xla.errors import UserError

GB = 1e9
_POLL_SECONDS = 0.2
_OUTPUT_LINES = 15  # of a failed process, for the error message
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(UserError):
    """A worker process exceeded a limit or failed."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a worker process.

    Attributes:
        memory: bytes of resident host memory.
        seconds: of wall-clock time.
    """

    memory: float
    seconds: float


def free_memory() -> float:
    """Return 90% of the available host memory in bytes; infinity if it is unknown."""
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
    """Run ``python -m module argument`` and wait for it.

    Args:
        module: name of the module.
        argument: its command-line argument.
        limits: the process is killed when it exceeds one.
        environment: variables to set in addition to those of this process.
        progress: called several times a second with elapsed seconds and bytes of resident memory.

    Raises:
        UserError: if the process failed with a ``UserError``.
        WorkerError: if it exceeded a limit, or failed otherwise; the message has the end of its
            output.
    """
    # The module selects its device itself.
    kept = {k: v for k, v in os.environ.items() if k not in ("CPU_NUM_DEVICES", "PJRT_DEVICE")}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, argument],
            env=kept | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        start = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                memory, seconds = _memory_of(process.pid), time.monotonic() - start
                progress(seconds, memory)
                if memory > limits.memory:
                    raise WorkerError(
                        f"{module} used more than {limits.memory / GB:.1f} GB of host memory and "
                        "was stopped: raise --max-memory (GB), or use --effort fast"
                    )
                if seconds > limits.seconds:
                    raise WorkerError(
                        f"{module} took longer than {limits.seconds:.0f} s and was stopped: raise "
                        "--timeout (seconds), or use --effort fast"
                    )
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode != 0:
            output.seek(0)
            _raise_failure(module, process.returncode, output.read())


def end_with_parent() -> None:
    """Let the kernel kill this worker process when its parent ends for any reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _raise_failure(module: str, status: int, output: str) -> NoReturn:
    marker = f"{UserError.__module__}.{UserError.__name__}: "
    lines = output.strip().splitlines()
    for line in reversed(lines):
        if line.startswith(marker):
            raise UserError(line.removeprefix(marker))
    ending = "\n".join(lines[-_OUTPUT_LINES:])
    cause = f"signal {-status}" if status < 0 else f"exit status {status}"
    raise WorkerError(f"{module} failed with {cause}:\n{ending}")


def _memory_of(pid: int) -> float:
    """Return the resident memory of a process in bytes; 0 if it is unknown."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
