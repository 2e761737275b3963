"""Interrupted writing of shards: it resumes, and the result is byte-identical."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numbered import numbered_arrays

from rae_xla import storage
from rae_xla.data.shards import journal as shard_journal
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.journal import Journal
from rae_xla.data.shards.sources import array_source, open_image_source
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import make_shards, write_shards
from rae_xla.errors import UserError
from rae_xla.storage.owner import process_started

pytestmark = pytest.mark.slow


def _source(count: int = 45, **options):
    return array_source(*numbered_arrays(count), **options)


def _make(out, source=None, stop: int | None = None, **options):
    """Make shards of 10 samples; if ``stop`` is given, interrupt it at that sample."""

    def progress(samples, done):
        seen.append(done)
        for number, sample in enumerate(samples, done):
            if number == stop:
                raise KeyboardInterrupt
            yield sample

    seen: list[int] = []
    options = {"samples_per_shard": 10} | options
    if stop is None:
        return make_shards(source or _source(), str(out), progress=progress, **options), seen
    with pytest.raises(KeyboardInterrupt):
        make_shards(source or _source(), str(out), progress=progress, **options)
    return None, seen


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _identity(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*.tar")}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_it_resumes_after_the_last_finished_shard(tmp_path, scheme):
    expected, seen = _make(tmp_path / "expected")
    assert seen == [0]
    out = tmp_path / "out"
    # 8 is in the first shard; at 20 the second is finished (its last sample was read already).
    for stop, finished, started_at in [(8, 0, 0), (9, 0, 0), (20, 1, 0), (33, 3, 10), (44, 4, 30)]:
        before = _identity(out) if out.exists() else {}
        _, seen = _make(f"{scheme}{out}", stop=stop)
        assert seen == [started_at]
        after = _identity(out)
        assert sorted(after) == [f"shard-00000{i}.tar" for i in range(finished)]
        assert {name: after[name] for name in before} == before
    before = _identity(out)
    index, seen = _make(f"{scheme}{out}")
    assert seen == [40]
    assert _contents(out) == _contents(tmp_path / "expected")
    assert {name: _identity(out)[name] for name in before} == before
    assert index.fingerprint == expected.fingerprint
    assert verify(str(out)) == []


def test_all_shards_were_finished_but_not_the_index(tmp_path, monkeypatch):
    _make(tmp_path / "expected")
    write = storage.write_bytes

    def fails_at_the_index(path, content):
        if path.endswith("index.json"):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", fails_at_the_index)
    with pytest.raises(UserError, match=r"No space left.*resumes after the last finished"):
        _make(tmp_path / "out")
    monkeypatch.undo()
    before = _identity(tmp_path / "out")
    _, seen = _make(tmp_path / "out")
    assert seen == [45]
    assert _identity(tmp_path / "out") == before
    assert _contents(tmp_path / "out") == _contents(tmp_path / "expected")


def test_another_recipe_is_an_error_that_names_the_difference(tmp_path):
    out = tmp_path / "out"
    _make(out, stop=30)
    before = _contents(out)
    names = tuple("abcde")
    for options, message in [
        ({"source": _source(46)}, r"images \(45 then, 46 now\)"),
        ({"source": _source(shuffle=False)}, "the images, their labels or order"),
        ({"source": _source(classes=names)}, "class names"),
        ({"source": _source(encoding=Encoding(6))}, r"--image-size \(None then, 6 now\)"),
        ({"source": _source(encoding=Encoding(quality=9))}, r"--quality \(None then, 9 now\)"),
        ({"samples_per_shard": 11}, r"--samples-per-shard \(10 then, 11 now\)"),
        ({"shard_size_bytes": 10**6}, r"--shard-size \(256000000 then, 1000000 now\)"),
        ({"prefix": "other"}, r"prefix \(shard then, other now\)"),
    ]:
        with pytest.raises(UserError, match=f"left 2 finished shards.*settings: {message}"):
            _make(out, **options)
    with pytest.raises(UserError, match="To resume it, run the command as before"):
        write_shards([ShardSample(b"", "png", 0)], str(out))
    assert _contents(out) == before
    changed, labels = numbered_arrays(45)
    changed[7, 3, 3] ^= 1
    with pytest.raises(UserError, match="the images, their labels or order"):
        _make(out, array_source(changed, labels))


def test_another_recipe_is_allowed_before_the_first_finished_shard(tmp_path):
    _make(tmp_path / "out", stop=5)
    index, seen = _make(tmp_path / "out", _source(12))
    assert (len(index), seen) == (12, [0])
    assert verify(index.folder) == []


def test_another_prefix_leaves_no_orphans(tmp_path):
    out = tmp_path / "out"
    _make(out, stop=25, prefix="old")
    (out / "old-000000.tar").unlink()  # so no shard counts as finished
    index, seen = _make(out, prefix="new")
    assert seen == [0]
    assert sorted(p.name for p in out.glob("*.tar")) == [s.file for s in index.shards]
    assert not list(out.glob(".*"))
    with pytest.raises(KeyboardInterrupt):
        write_shards(_interrupted(), str(tmp_path / "b"), samples_per_shard=1, prefix="old")
    write_shards(_source(3), str(tmp_path / "b"), prefix="new")
    assert [p.name for p in (tmp_path / "b").glob("*.tar")] == ["new-000000.tar"]


def _interrupted():
    yield from _source(3)
    raise KeyboardInterrupt


def test_workers_may_differ_between_the_attempts(tmp_path):
    _make(tmp_path / "expected")
    _make(tmp_path / "out", _source(workers=2), stop=25)
    _make(tmp_path / "out", _source(workers=3))
    assert _contents(tmp_path / "out") == _contents(tmp_path / "expected")


@pytest.mark.parametrize("damage", ["missing", "truncated", "entry", "entry cut"])
def test_a_lost_finished_shard_is_written_again(tmp_path, damage):
    _make(tmp_path / "expected")
    out = tmp_path / "out"
    _make(out, stop=41)
    shard, entry = out / "shard-000002.tar", out / ".writing-shard-000002"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        os.truncate(shard, 3000)
    elif damage == "entry":
        entry.unlink()
    else:
        os.truncate(entry, 300)
    _, seen = _make(out)
    assert seen == [20]
    assert _contents(out) == _contents(tmp_path / "expected")


def test_files_of_a_killed_attempt_are_cleared(tmp_path):
    _make(tmp_path / "expected")
    out = tmp_path / "out"
    _make(out, stop=25)
    (out / "shard-000002.tar.tmp-abcd1234").write_bytes(b"half")
    (out / "shard-000002.tar").write_bytes(b"finished, but not recorded")
    (out / ".writing-shard-000001.tmp-00ff").write_bytes(b"half")
    (out / "samples.npy").write_bytes(b"half")
    for name in ("samples.npy", "index.json", ".writing"):
        (out / f"{name}.tmp-00ff").write_bytes(b"half")
    _make(out)
    assert _contents(out) == _contents(tmp_path / "expected")


def test_killed_while_writing_the_first_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".writing.tmp-00ff").write_bytes(b"half")
    _make(out)
    assert not list(out.glob(".*"))
    assert verify(str(out)) == []


def test_killed_after_writing_the_index(tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    _make(tmp_path / "expected")
    out = tmp_path / "out"
    monkeypatch.setattr(Journal, "close", killed)
    with pytest.raises(KeyboardInterrupt):
        _make(out)
    monkeypatch.undo()
    (out / ".writing-shard-000001").unlink()  # or killed a little later
    (out / ".writing.tmp-00ff").write_bytes(b"half")
    before = _contents(out)
    assert {"index.json", ".writing", ".writing-shard-000000"} <= set(before)
    for other in (lambda: _make(out, _source(46)), lambda: write_shards(_source(), str(out))):
        with pytest.raises(UserError, match="has finished shards already"):
            other()
    assert _contents(out) == before
    index, seen = _make(out)
    assert (len(index), seen) == (45, [])
    assert _contents(out) == _contents(tmp_path / "expected")
    with pytest.raises(UserError, match="has finished shards already"):
        _make(out)


@pytest.fixture(params=["local", "bucket"])
def shared_folder(request, tmp_path) -> str:
    """A folder that several hosts can write to."""
    if request.param == "local":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('bucket')}/out"


def _names(folder: str) -> list[str]:
    return sorted(storage.list_files(folder))


def _bytes(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in _names(folder)}


def _change_owner(folder: str, **changes) -> None:
    path = storage.join(folder, ".writing")
    mark = json.loads(storage.read_bytes(path))
    mark["owner"] |= changes
    storage.write_bytes(path, json.dumps(mark).encode())


def _taken_over(folder: str, at: int, newer, error: bool = False, **options) -> str:
    """Make shards, call ``newer`` at one sample, and return the error of the older attempt.

    The newer attempt runs in this process, so that the older one is not known to be alive.
    """

    def progress(samples, done):
        for number, sample in enumerate(samples, done):
            if number == at:
                newer()
                after.append(_bytes(folder))
                if error:
                    raise FileNotFoundError(2, "No such file or directory", "x.tmp-1234")
            yield sample

    after: list[dict[str, bytes]] = []
    with pytest.raises(UserError) as caught:
        make_shards(_source(), folder, samples_per_shard=10, progress=progress, **options)
    assert _bytes(folder) == after[0], "it wrote a file after the folder was taken over"
    return str(caught.value)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("at", [5, 25, 33])
def test_the_older_of_two_attempts_stops_and_the_newer_one_continues(
    tmp_path, shared_folder, at, error
):
    message = _taken_over(shared_folder, at, lambda: _make(shared_folder, stop=38), error)
    name = os.uname().nodename
    assert f"another process is writing here ({name}, process {os.getpid()})" in message
    assert message.count("\n") == 0
    _, seen = _make(shared_folder)
    assert seen == [30]
    _make(tmp_path / "expected")
    assert _bytes(shared_folder) == _bytes(str(tmp_path / "expected"))


def test_the_newer_of_two_attempts_finishes_first(tmp_path, shared_folder):
    message = _taken_over(shared_folder, 25, lambda: _make(shared_folder))
    assert "another process has finished the shards here" in message
    _make(tmp_path / "expected")
    assert _bytes(shared_folder) == _bytes(str(tmp_path / "expected"))


def test_the_older_attempt_does_not_damage_shards_of_another_recipe(shared_folder):
    """No shard was finished before the newer attempt, so it may use another recipe."""
    message = _taken_over(
        shared_folder, 5, lambda: _make(shared_folder, _source(38), stop=35), prefix="shard"
    )
    assert "another process is writing here" in message
    index, seen = _make(shared_folder, _source(38))
    assert seen == [30]
    assert verify(index.folder) == []


def test_write_shards_stops_when_the_folder_is_taken_over(shared_folder):
    def samples():
        for number, sample in enumerate(_source()):
            if number == 15:
                _make(shared_folder, stop=15)
            yield sample

    with pytest.raises(UserError, match="another process is writing here"):
        write_shards(samples(), shared_folder, samples_per_shard=10)


def test_a_folder_of_a_running_process_is_not_taken_over(shared_folder):
    _make(shared_folder, stop=25)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = process_started(other.pid)
        _change_owner(shared_folder, pid=other.pid, started=started)
        before = _bytes(shared_folder)
        for attempt in (
            lambda: _make(shared_folder),
            lambda: write_shards(_source(), shared_folder),
            lambda: shard_journal.check_target(shared_folder),
        ):
            with pytest.raises(UserError, match=f"are being written here by process {other.pid}:"):
                attempt()
        assert _bytes(shared_folder) == before
        # The state of another host is unknown, and a process id may have been reused.
        for change in ({"host": "elsewhere"}, {"started": "before"}):
            _change_owner(shared_folder, **change)
            shard_journal.check_target(shared_folder)
            _change_owner(shared_folder, host=os.uname().nodename, started=started)
        other.kill()
        while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        shard_journal.check_target(shared_folder)  # killed, but its parent has not waited for it
    finally:
        other.kill()
        other.communicate()
    _, seen = _make(shared_folder)
    assert seen == [20]


def test_a_failed_write_is_one_error(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000001.tar").mkdir()  # a folder cannot be replaced by a file
    (out / ".writing").write_bytes(b"")
    with pytest.raises(UserError, match=r"resumes after the last finished shard"):
        _make(out)
    (out / "shard-000001.tar").rmdir()
    _, seen = _make(out)
    assert seen == [10]
    assert verify(str(out)) == []


def test_unfinished_shards_are_not_a_source(tmp_path):
    _make(tmp_path / "out", stop=25)
    with pytest.raises(UserError, match="out: shards are being written here"):
        open_image_source(str(tmp_path / "out"))
    with pytest.raises(UserError, match="out: shards are being written here"):
        index_shards(str(tmp_path / "out"))
