"""Building batches in the background: order, errors, and the end of threads and processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest

from rae_xla.data.batch_builder import BuiltRows
from rae_xla.data.prefetch import build_in_processes, build_in_thread
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


class CountingBatches:
    """Cheap batches; at module level, so that they pickle."""

    def __init__(self, broken_step: int = -1, error: type[Exception] = UserError) -> None:
        self.broken_step, self.error = broken_step, error

    def open(self, first: int, last: int, look_ahead: int = 0) -> "CountingBuilder":
        return CountingBuilder(self, first, last)

    def arrays(self, step: int, first: int, last: int) -> dict[str, np.ndarray]:
        if step == self.broken_step:
            raise self.error(f"step {step} is broken")
        numbers = step * 100 + np.arange(first, last)
        return {"x": numbers, "image": np.repeat(numbers, 12).astype(np.uint8).reshape(-1, 3, 4)}


class CountingBuilder:
    def __init__(self, spec: CountingBatches, first: int, last: int) -> None:
        self.spec, self.first, self.last = spec, first, last

    def build(self, step: int) -> BuiltRows:
        return BuiltRows(self.spec.arrays(step, self.first, self.last), [])

    def close(self) -> None:
        pass


def _build(kind, spec, steps, first=4, last=11, ahead=2):
    if kind == "thread":
        return build_in_thread(spec, steps, first, last, ahead)
    return build_in_processes(spec, steps, first, last, ahead, 2)


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["thread", "processes"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
def test_every_step_once_in_order(kind, steps):
    built = [
        {k: v.copy() for k, v in arrays.items()}
        for arrays, _ in _build(kind, SPEC, iter(range(steps)))
    ]
    assert len(built) == steps
    for step, batch in enumerate(built):
        expected = SPEC.arrays(step, 4, 11)
        assert batch.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name])
            assert batch[name].dtype == expected[name].dtype


SPEC = CountingBatches()


class ReadAheadChecks(CountingBatches):
    """Requires that only workers read ahead: the main process builds a single row."""

    def open(self, first: int, last: int, look_ahead: int = 512) -> CountingBuilder:
        assert (look_ahead == 0) == (multiprocessing.parent_process() is None)
        return super().open(first, last)


def test_the_main_process_does_not_read_ahead():
    assert len(list(_build("processes", ReadAheadChecks(), iter(range(3))))) == 3


def test_the_batch_in_use_is_not_overwritten():
    batches = _build("processes", SPEC, count(), ahead=3)
    for step in range(8):
        batch = next(batches).arrays
        time.sleep(0.02)
        np.testing.assert_array_equal(batch["x"], step * 100 + np.arange(4, 11))
    batches.close()


@pytest.mark.parametrize("kind", ["thread", "processes"])
def test_an_error_is_raised_in_order_and_ends_all_workers(kind):
    batches = _build(kind, CountingBatches(broken_step=3), count())
    for _ in range(3):
        next(batches)
    with pytest.raises(UserError, match=r"^step 3 is broken$"):
        next(batches)
    assert multiprocessing.active_children() == []


def test_a_bug_in_a_worker_is_raised_with_its_traceback():
    batches = _build("processes", CountingBatches(broken_step=1, error=KeyError), count())
    next(batches)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in arrays.*step 1 is broken"):
        next(batches)


def test_a_worker_that_dies_is_one_error():
    batches = _build("processes", SPEC, count())
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a data worker process died"):
        list(islice(batches, 10))
    assert multiprocessing.active_children() == []


SCRIPT = """
import time
from itertools import count
from multiprocessing import active_children
from test_prefetch import SPEC
from rae_xla.data.prefetch import build_in_processes

if __name__ == "__main__":
    batches = build_in_processes(SPEC, count(), 0, 8, 2, 2)
    next(batches)
    print(*(child.pid for child in active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_when_the_main_process_does(tmp_path, number):
    (tmp_path / "main.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    main = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    workers = [int(pid) for pid in main.stdout.readline().split()]
    assert len(workers) == 2
    assert all(Path(f"/proc/{pid}").exists() for pid in workers)
    main.send_signal(number)
    main.wait(20)
    _wait_until(lambda: not any(_is_running(pid) for pid in workers))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_do_not_import_torch():
    """So they start faster and need less memory; see ``batch_builder``."""
    code = (
        "import sys, rae_xla.data.prefetch, rae_xla.data.shards.sources;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
