"""`rae-xla shards make`, interrupted in different ways: run again, it gives the same shards."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_xla.data.shards.verify import verify

pytestmark = pytest.mark.slow

PER_SHARD = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """80 images, each about 20 ms of work."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (700, 600, 3), dtype=np.uint8)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for number in range(40):
            rolled = np.roll(pixels, number * 7 + len(name), axis=number % 2)
            Image.fromarray(rolled).save(folder / name / f"{number}.bmp")
    return folder


def _command(images: Path, out: Path, workers: int) -> list[str]:
    options = f"--image-size 300 --samples-per-shard {PER_SHARD} --workers {workers}"
    arguments = ["shards", "make", str(images), str(out), *options.split()]
    return [sys.executable, "-m", "rae_xla", *arguments]


def _start(images: Path, out: Path, workers: int = 3, **options) -> subprocess.Popen:
    return subprocess.Popen(
        _command(images, out, workers),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    subprocess.run(_command(images, out, 1), check=True, capture_output=True, timeout=120)
    return _contents(out)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _recorded(out: Path) -> list[str]:
    """Return the shards that are recorded as finished."""
    entries = out.glob(".writing-shard-*") if out.exists() else ()
    return sorted(
        f"{p.name.removeprefix('.writing-')}.tar" for p in entries if ".tmp" not in p.name
    )


def _wait(condition, description: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timeout: {description}"
        time.sleep(0.005)


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def _children(process: int) -> list[int]:
    """Return its worker processes, without the resource tracker of multiprocessing."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [
        child
        for child in map(int, text.split())
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def _resume(images: Path, out: Path, uninterrupted: dict[str, bytes], workers: int = 2) -> str:
    """Run the command again, compare all files, and return its stderr."""
    finished = _recorded(out)
    before = {name: os.stat(out / name) for name in finished}
    done = subprocess.run(
        _command(images, out, workers), check=True, capture_output=True, text=True, timeout=120
    )
    assert f"{out}: resuming after {PER_SHARD * len(finished)} images" in done.stderr
    assert _contents(out) == uninterrupted
    for name, stat in before.items():
        again = os.stat(out / name)
        assert (again.st_ino, again.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    return done.stderr


def test_killed_twice_with_several_workers(images, tmp_path, uninterrupted):
    out = tmp_path / "out"
    for enough in (2, 5):
        process = _start(images, out)
        _wait(lambda enough=enough: len(_recorded(out)) >= enough, "finished shards")
        process.kill()
        process.wait()
        # The workers end by themselves, because their pipe is closed.
        _wait(lambda pid=process.pid: _group_is_gone(pid), "the end of the workers")
        assert len(_recorded(out)) < len(uninterrupted) - 2, "it finished before it was killed"
    _resume(images, out, uninterrupted)
    assert verify(str(out)) == []


def test_interrupted_by_the_user(images, tmp_path, uninterrupted):
    out = tmp_path / "out"
    process = _start(images, out)
    _wait(lambda: len(_recorded(out)) >= 2, "finished shards")
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers, too
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGINT
    assert stderr.splitlines()[-1] == "rae-xla: interrupted"
    assert "Traceback" not in stderr
    assert not list(out.glob("*.tmp-*"))
    _wait(lambda: _group_is_gone(process.pid), "the end of the workers")
    _resume(images, out, uninterrupted)


def test_a_killed_worker(images, tmp_path, uninterrupted):
    out = tmp_path / "out"
    process = _start(images, out)
    _wait(lambda: len(_recorded(out)) >= 1, "a finished shard")
    os.kill(_children(process.pid)[0], signal.SIGKILL)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("rae-xla: error: a worker process died")
    assert "Traceback" not in stderr
    assert not list(out.glob("*.tmp-*"))
    _wait(lambda: _group_is_gone(process.pid), "the end of the workers")
    _resume(images, out, uninterrupted)


def test_a_full_disk(images, tmp_path, uninterrupted):
    """A limit of 2 MB on files makes writing a larger shard fail."""
    out = tmp_path / "out"
    limit = 2_000_000
    assert len(uninterrupted["shard-000000.tar"]) > limit
    limited = _start(
        images, out, 2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)
    )
    stderr = limited.communicate(timeout=60)[1]
    assert limited.returncode == 2
    assert "File too large" in stderr.splitlines()[-1]
    assert "fix the cause and run the same command again" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [".writing"]
    again = subprocess.run(_command(images, out, 2), check=True, capture_output=True, timeout=120)
    assert b"resuming" not in again.stderr
    assert _contents(out) == uninterrupted


def test_workers_end_silently_when_the_main_process_is_killed(images, tmp_path):
    """The main process is stopped first, so that it has not read all replies when it is killed.

    The replies must fit into a pipe, so the images are small.
    """
    with open(tmp_path / "stderr", "w+") as stderr:
        out = tmp_path / "out"
        command = [*_command(images, out, 2), "--image-size", "100"]
        process = subprocess.Popen(command, stderr=stderr, start_new_session=True, text=True)
        _wait(lambda: len(_recorded(out)) >= 1, "a finished shard")
        workers = _children(process.pid)
        assert len(workers) == 2
        process.send_signal(signal.SIGSTOP)
        _wait(lambda: _are_idle(workers), "idle workers")
        process.kill()
        process.wait()
        _wait(lambda: _group_is_gone(process.pid), "the end of the workers")
        stderr.seek(0)
        printed = stderr.read().splitlines()
    assert [line for line in printed if line and not line.startswith("writing shards")] == []


def _are_idle(processes: list[int]) -> bool:
    """Return whether they use no CPU for longer than an image takes."""

    def used() -> list[list[str]]:
        stats = [Path(f"/proc/{process}/stat").read_text() for process in processes]
        return [stat.rpartition(")")[2].split()[11:13] for stat in stats]

    before = used()
    time.sleep(0.5)
    return used() == before


def test_a_second_command_into_the_same_folder(images, tmp_path, uninterrupted):
    out = tmp_path / "out"
    process = _start(images, out, 2)
    _wait(lambda: len(_recorded(out)) >= 1, "a finished shard")
    os.killpg(process.pid, signal.SIGSTOP)  # it must not finish before the second has started
    second = subprocess.run(_command(images, out, 2), capture_output=True, text=True, timeout=60)
    os.killpg(process.pid, signal.SIGCONT)
    assert second.returncode == 2
    [message] = [line for line in second.stderr.splitlines() if line]
    assert f"{out}: shards are being written here by process {process.pid}" in message
    assert process.wait(timeout=60) == 0
    assert _contents(out) == uninterrupted
    process.stderr.close()


def test_killed_after_writing_the_index(images, tmp_path, uninterrupted):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys; from rae_xla.cli.main import main; "
        "from rae_xla.data.shards import journal; "
        "journal.Journal.close = lambda self: os.kill(os.getpid(), signal.SIGKILL); "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = _command(images, out, 1)
    patched = [sys.executable, "-c", code, *command[3:]]
    killed = subprocess.run(patched, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (out / "index.json").exists()
    assert (out / ".writing").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert f"{out}: 80 images of 2 classes" in again.stdout
    assert _contents(out) == uninterrupted
