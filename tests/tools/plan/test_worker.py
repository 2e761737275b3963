"""Worker processes with limits. The module ``timeit`` runs a statement given as its argument."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rae_xla.errors import UserError
from rae_xla.tools.plan.worker import GB, Limits, WorkerError, free_memory, run_module

NONE = Limits(math.inf, math.inf)


def run(statement: str, limits: Limits = NONE, **environment: str) -> list[tuple[float, float]]:
    calls: list[tuple[float, float]] = []
    run_module("timeit", statement, limits, environment, lambda *progress: calls.append(progress))
    return calls


def test_progress_is_reported():
    calls = run("import time; time.sleep(0.1)")
    seconds = [second for second, _ in calls]
    assert seconds == sorted(seconds)
    assert max(memory for _, memory in calls) > 1e6  # at least a Python interpreter


def test_the_environment_is_passed_on():
    run("import os; assert os.environ['RAE_PLANNED'] == '1'", RAE_PLANNED="1")


def test_a_process_over_the_memory_limit_is_stopped():
    with pytest.raises(WorkerError, match=r"more than 0\.2 GB .* --max-memory"):
        run("x = bytearray(b'1') * 2**29; import time; time.sleep(60)", Limits(0.2 * GB, math.inf))


def test_a_process_over_the_time_limit_is_stopped():
    with pytest.raises(WorkerError, match=r"longer than 1 s .* --timeout"):
        run("import time; time.sleep(60)", Limits(math.inf, 1))


def test_the_output_of_an_aborted_process_is_reported():
    statement = "import os, sys; print('last line', flush=True); os.abort()"
    with pytest.raises(WorkerError, match=r"(?s)signal 6:.*last line"):
        run(statement)


def test_a_user_error_of_the_process_is_raised_again():
    statement = "from rae_xla.errors import UserError; raise UserError('mesh: 3 is not 4')"
    with pytest.raises(UserError, match=r"^mesh: 3 is not 4$") as caught:
        run(statement)
    assert not isinstance(caught.value, WorkerError)


def test_the_process_ends_with_its_parent(tmp_path):
    pid_file = tmp_path / "pid"
    statement = (
        "import os, pathlib, time; from rae_xla.tools.plan.worker import end_with_parent; "
        f"end_with_parent(); pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); "
        "time.sleep(60)"
    )
    parent_code = (
        "from rae_xla.tools.plan.worker import *; import math; "
        f"run_module('timeit', {statement!r}, Limits(math.inf, math.inf), {{}}, lambda *_: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    while not (pid_file.exists() and pid_file.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    status = Path(f"/proc/{pid_file.read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():  # else the test times out
        time.sleep(0.05)


def test_free_memory():
    assert free_memory() > 1e6
