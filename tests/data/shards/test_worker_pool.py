"""The worker pool: order, errors, and the end of its processes."""

import gc
import os
import signal
import time
from multiprocessing.connection import Connection

import pytest

from rae_xla.data.shards.worker_pool import ordered_map
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


def _square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def _failing(item: str) -> str:
    if item == "user":
        raise UserError("x.png: not a readable image")
    if item == "disk":
        raise OSError(28, "No space left on device", "/somewhere")
    if item == "bucket":
        raise PermissionError("gs://x/y: 401. Set up credentials")
    if item == "bug":
        raise KeyError("surprise")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _large(number: int) -> bytes:
    return bytes([number % 256]) * 300_000


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_order(workers):
    assert list(ordered_map(_square, range(50), workers)) == [n * n for n in range(50)]
    assert list(ordered_map(_square, [], workers)) == []


def test_items_and_results_larger_than_a_pipe():
    items = [bytes(200_000) + bytes([n]) for n in range(40)]
    assert list(ordered_map(len, items, 2)) == [200_001] * 40
    for number, result in enumerate(ordered_map(_large, range(40), 2)):
        assert result == _large(number)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("item", "kind", "message"),
    [
        ("user", UserError, r"^x\.png: not a readable image$"),
        ("disk", OSError, r"^\[Errno 28\] No space left on device: '/somewhere'$"),
        ("bucket", OSError, r"^gs://x/y: 401\. Set up credentials$"),
        ("bug", (KeyError, RuntimeError), "surprise"),
    ],
)
def test_errors_are_raised_in_order(item, kind, message, workers):
    done = []
    with pytest.raises(kind, match=message):
        done += ordered_map(_failing, ["a", "b", item, "c"], workers)
    assert done == ["a", "b"]


def test_a_worker_that_dies_is_one_error():
    results = ordered_map(_failing, ["a", "b", "killed", *"cdefgh"], 2)
    assert [next(results), next(results)] == ["a", "b"]
    with pytest.raises(UserError, match="a worker process died"):
        list(results)


@pytest.mark.parametrize("stop_after", [3, 50])
def test_the_pipes_are_closed(stop_after):
    results = ordered_map(_square, range(50), 2)
    some = [next(results) for _ in range(stop_after)]
    assert len(some) == stop_after
    pipes = [thing for thing in gc.get_objects() if type(thing) is Connection and not thing.closed]
    assert len(pipes) == 2
    results.close()
    assert all(pipe.closed for pipe in pipes)


def test_closing_early_ends_the_workers():
    results = ordered_map(_sleep, [0, *[60] * 10], 2)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 10
