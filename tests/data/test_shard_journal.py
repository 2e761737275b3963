"""Making shards, interrupted: it goes on, and the result is the same byte by byte."""

import os
from pathlib import Path

import pytest
from numbered import numbered_arrays

from rae_xla.data import storage
from rae_xla.data.encoding import Encoding
from rae_xla.data.foreign_shards import index_shards
from rae_xla.data.shards import ShardSample, make_shards, verify, write_shards
from rae_xla.data.sources import array_source, open_source
from rae_xla.errors import UserError


def _source(count: int = 45, **options):
    return array_source(*numbered_arrays(count), **options)


def _make(out, source=None, stop: int | None = None, **options):
    """Make shards of 10; if ``stop`` is given, be interrupted at that sample."""

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
def test_it_goes_on_after_the_last_finished_shard(tmp_path, scheme):
    whole, seen = _make(tmp_path / "whole")
    assert seen == [0]
    out = tmp_path / "out"
    # 8 is in the first shard; at 20 the second is finished (its last sample is out already).
    for stop, finished, begun_at in [(8, 0, 0), (9, 0, 0), (20, 1, 0), (33, 3, 10), (44, 4, 30)]:
        before = _identity(out) if out.exists() else {}
        _, seen = _make(f"{scheme}{out}", stop=stop)
        assert seen == [begun_at]
        after = _identity(out)
        assert sorted(after) == [f"shard-00000{i}.tar" for i in range(finished)]
        assert {name: after[name] for name in before} == before
    before = _identity(out)
    index, seen = _make(f"{scheme}{out}")
    assert seen == [40]
    assert _contents(out) == _contents(tmp_path / "whole")
    assert {name: _identity(out)[name] for name in before} == before
    assert index.fingerprint == whole.fingerprint
    assert verify(str(out)) == []


def test_all_shards_were_finished_but_not_the_index(tmp_path, monkeypatch):
    _make(tmp_path / "whole")
    write = storage.write_bytes

    def fails_at_the_index(path, content):
        if path.endswith("index.json"):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(storage, "write_bytes", fails_at_the_index)
    with pytest.raises(UserError, match=r"No space left.*goes on after the last finished"):
        _make(tmp_path / "out")
    monkeypatch.undo()
    before = _identity(tmp_path / "out")
    _, seen = _make(tmp_path / "out")
    assert seen == [45]
    assert _identity(tmp_path / "out") == before
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


def test_another_recipe_is_refused_and_what_differs_is_named(tmp_path):
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
    ]:
        with pytest.raises(UserError, match=f"left 2 finished shards.*otherwise: {message}"):
            _make(out, **options)
    with pytest.raises(UserError, match="To go on, run the command as it was then"):
        write_shards([ShardSample(b"", "png", 0)], str(out))
    assert _contents(out) == before
    changed, labels = numbered_arrays(45)
    changed[7, 3, 3] ^= 1
    with pytest.raises(UserError, match="the images, their labels or order"):
        _make(out, array_source(changed, labels))


def test_nothing_finished_is_nothing_to_lose(tmp_path):
    _make(tmp_path / "out", stop=5)
    index, seen = _make(tmp_path / "out", _source(12))
    assert (len(index), seen) == (12, [0])
    assert verify(index.folder) == []


def test_workers_may_differ_between_the_attempts(tmp_path):
    _make(tmp_path / "whole")
    _make(tmp_path / "out", _source(workers=2), stop=25)
    _make(tmp_path / "out", _source(workers=3))
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "truncated", "entry", "entry cut"])
def test_a_finished_shard_that_was_lost_is_made_again(tmp_path, damage):
    _make(tmp_path / "whole")
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
    assert _contents(out) == _contents(tmp_path / "whole")


def test_files_of_a_killed_attempt_are_cleared(tmp_path):
    _make(tmp_path / "whole")
    out = tmp_path / "out"
    _make(out, stop=25)
    (out / "shard-000002.tar.tmp-abcd1234").write_bytes(b"half")
    (out / "shard-000002.tar").write_bytes(b"finished, but not on record")
    (out / ".writing-shard-000001.tmp-00ff").write_bytes(b"half")
    (out / "samples.npy").write_bytes(b"half")
    _make(out)
    assert _contents(out) == _contents(tmp_path / "whole")


def test_a_write_that_fails_is_one_error(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-000001.tar").mkdir()  # what cannot be replaced by a file
    (out / ".writing").write_bytes(b"")
    with pytest.raises(UserError, match=r"goes on after the last finished shard"):
        _make(out)
    (out / "shard-000001.tar").rmdir()
    _, seen = _make(out)
    assert seen == [10]
    assert verify(str(out)) == []


def test_unfinished_shards_are_no_source(tmp_path):
    _make(tmp_path / "out", stop=25)
    with pytest.raises(UserError, match="out: shards are being written here"):
        open_source(str(tmp_path / "out"))
    with pytest.raises(UserError, match="out: shards are being written here"):
        index_shards(str(tmp_path / "out"))
