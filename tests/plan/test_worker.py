"""Processes that are watched. ``timeit`` runs what it is given, as the plan's own modules do."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae_xla.errors import UserError
from rae_xla.plan.worker import GB, Limits, WorkerError, free_memory, run_module

NONE = Limits(math.inf, math.inf)


def run(statement: str, limits: Limits = NONE, **environment: str) -> list[tuple[float, float]]:
    seen: list[tuple[float, float]] = []
    run_module("timeit", statement, limits, environment, lambda *now: seen.append(now))
    return seen


def test_progress_is_told():
    seen = run("import time; time.sleep(0.1)")
    seconds = [second for second, _ in seen]
    assert seconds == sorted(seconds)
    assert max(memory for _, memory in seen) > 1e6  # a Python


def test_the_environment_is_passed_on():
    run("import os; assert os.environ['RAE_PLANNED'] == '1'", RAE_PLANNED="1")


def test_too_much_memory():
    with pytest.raises(WorkerError, match=r"more than 0\.2 GB .* --max-memory"):
        run("x = bytearray(b'1') * 2**29; import time; time.sleep(60)", Limits(0.2 * GB, math.inf))


def test_too_long():
    with pytest.raises(WorkerError, match=r"longer than 1 s .* --timeout"):
        run("import time; time.sleep(60)", Limits(math.inf, 1))


def test_an_abort_is_told_with_its_last_words():
    statement = "import os, sys; print('last words', flush=True); os.abort()"
    with pytest.raises(WorkerError, match=r"(?s)ended by signal 6:.*last words"):
        run(statement)


def test_what_the_user_can_mend_is_said_plainly():
    statement = "from rae_xla.errors import UserError; raise UserError('mesh: 3 is not 4')"
    with pytest.raises(UserError, match=r"^mesh: 3 is not 4$") as caught:
        run(statement)
    assert not isinstance(caught.value, WorkerError)


def test_it_ends_with_the_process_that_watches_it(tmp_path):
    pid_file = tmp_path / "pid"
    statement = (
        "import os, pathlib, time; from rae_xla.plan.worker import end_with_parent; "
        f"end_with_parent(); pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); "
        "time.sleep(60)"
    )
    watch = (
        "from rae_xla.plan.worker import *; import math; "
        f"run_module('timeit', {statement!r}, Limits(math.inf, math.inf), {{}}, lambda *_: None)"
    )
    watcher = subprocess.Popen([sys.executable, "-c", watch])
    while not (pid_file.exists() and pid_file.read_text()):
        assert watcher.poll() is None
        time.sleep(0.05)
    watcher.kill()
    watcher.wait()
    status = Path(f"/proc/{pid_file.read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():  # else the test's own timeout
        time.sleep(0.05)


def test_free_memory():
    assert free_memory() > 1e6
