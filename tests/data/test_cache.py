import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from rae_xla.data import storage
from rae_xla.data.cache import OWN_FOLDER, PIECE, RangeCache
from rae_xla.data.index import Shard
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError

pytestmark = pytest.mark.unhurried

SIZE = 5 * PIECE + 12_345


def write_random(path: Path, size: int = SIZE) -> Shard:
    path.write_bytes(np.random.default_rng(0).bytes(size))
    return Shard(path.name, 1, size, "ab" * 32)


@pytest.fixture
def shard(tmp_path):
    return write_random(tmp_path / "shard.tar")


@pytest.fixture
def cache(tmp_path):
    made = RangeCache(str(tmp_path / "cache"), 100 * PIECE)
    made.prepare()
    return made


RANGES = [(0, 10), (PIECE - 5, 10), (0, SIZE), (SIZE - 7, 7), (2 * PIECE, PIECE), (3, 4 * PIECE)]


@pytest.mark.parametrize(("start", "length"), RANGES)
def test_a_range_is_what_the_shard_holds_and_is_read_from_it_once(
    tmp_path, shard, cache, start, length
):
    path = tmp_path / "shard.tar"
    expected = path.read_bytes()[start : start + length]
    assert cache.read(shard, str(path), start, length, None) == expected
    path.unlink()
    assert cache.read(shard, str(path), start, length, None) == expected


def test_only_what_is_missing_is_read_in_as_few_requests_as_possible(
    tmp_path, shard, cache, monkeypatch
):
    path, asked = str(tmp_path / "shard.tar"), []
    real = storage.read_range

    def counting(path, start, length, generation=None):
        asked.append((start // PIECE, length // PIECE))
        return real(path, start, length, generation)

    monkeypatch.setattr(storage, "read_range", counting)
    cache.read(shard, path, 2 * PIECE, PIECE, None)
    cache.read(shard, path, 0, SIZE, None)
    assert asked == [(2, 1), (0, 2), (3, 3)]


def test_a_truncated_shard_gives_less_and_is_not_kept(tmp_path, shard, cache):
    path = tmp_path / "shard.tar"
    os.truncate(path, PIECE + 100)
    assert len(cache.read(shard, str(path), PIECE, 200, None)) == 100
    write_random(path)  # put back
    assert cache.read(shard, str(path), PIECE, 200, None) == path.read_bytes()[PIECE:][:200]


def test_the_folder_stays_below_its_size(tmp_path):
    cache = RangeCache(str(tmp_path / "cache"), 8 * PIECE)
    cache.prepare()
    path = tmp_path / "large.tar"
    shard = write_random(path, 40 * PIECE)
    for number in range(40):
        cache.read(shard, str(path), number * PIECE, PIECE, None)
        on_disk = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file())
        assert on_disk <= 10 * PIECE  # a piece being stored, and the books
    recent = cache.read(shard, str(path), 39 * PIECE, PIECE, None)
    path.unlink()
    assert cache.read(shard, str(path), 39 * PIECE, PIECE, None) == recent
    with pytest.raises(FileNotFoundError):
        cache.read(shard, str(path), 0, PIECE, None)


def test_it_pickles(cache, shard, tmp_path):
    path = str(tmp_path / "shard.tar")
    expected = cache.read(shard, path, 5, 100, None)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(cache.read, [(shard, path, 5, 100, None)] * 4) == [expected] * 4


STORING = """
import sys
from rae_xla.data.cache import PIECE, RangeCache
from rae_xla.data.index import Shard

cache = RangeCache(sys.argv[1], 1000 * PIECE)
print("ready", flush=True)
shard = Shard("shard.tar", 1, 400 * PIECE, "ab" * 32)
for number in range(400):
    cache.read(shard, sys.argv[2], number * PIECE, PIECE, None)
"""


def test_processes_killed_while_they_store_leave_nothing_wrong(tmp_path):
    path, folder = tmp_path / "large.tar", tmp_path / "cache"
    shard = write_random(path, 400 * PIECE)
    for wait in (0.02, 0.1, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-c", STORING, str(folder), str(path)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = RangeCache(str(folder), 1000 * PIECE)
    cache.prepare()
    whole = path.read_bytes()
    assert cache.read(shard, str(path), 0, len(whole), None) == whole
    books = cache.size()
    on_disk = sum(f.stat().st_size for f in folder.rglob("*.val"))
    assert on_disk == pytest.approx(books, rel=0.02)  # no file that is in no book


def test_a_stream_through_a_cache(make_shards, tmp_path, cache):
    index = make_shards(100)

    def batches(workers, cache):
        stream = SampleStream(
            index, seed=5, global_batch_size=16, transform=CenterCrop(8), num_workers=workers,
            cache=cache,
        )  # fmt: skip
        made = stream.batches(3)
        taken = list(islice(made, 8))
        made.close()
        return taken

    clean = batches(0, None)
    for workers in (0, 2):
        for ours, theirs in zip(batches(workers, cache), clean, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
    for shard in index.shards:
        os.remove(index.path_of(shard))
    for ours, theirs in zip(batches(2, cache), clean, strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_a_damaged_piece_is_read_again_from_the_shard(make_shards, cache, tmp_path):
    index = make_shards(100)

    def batches():
        stream = SampleStream(
            index, seed=5, global_batch_size=16, transform=CenterCrop(8), cache=cache
        )
        made = stream.batches()
        taken = list(islice(made, 6))
        made.close()
        return taken

    clean = batches()
    for piece in (tmp_path / "cache").rglob("*.val"):
        piece.write_bytes(bytes(piece.stat().st_size))
    for ours, theirs in zip(batches(), clean, strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path, shard):
    other = tmp_path / "ssd" / "thesis" / "chapter1.tex"
    other.parent.mkdir(parents=True)
    other.write_text("the only copy")
    cache = RangeCache(str(tmp_path / "ssd"), 100 * PIECE)
    cache.prepare()
    cache.read(shard, str(tmp_path / "shard.tar"), 0, SIZE, None)
    cache.prepare()
    assert other.read_text() == "the only copy"
    assert cache.size() > SIZE


def test_books_that_a_crash_of_the_machine_damaged_are_begun_anew(tmp_path, shard, cache):
    path = tmp_path / "shard.tar"
    cache.read(shard, str(path), 0, SIZE, None)
    [books] = (tmp_path / "cache").rglob("cache.db")
    for leftover in books.parent.glob("cache.db-*"):
        leftover.unlink()
    content = bytearray(books.read_bytes())
    content[:4000] = b"\xff" * 4000
    books.write_bytes(content)
    again = RangeCache(cache.folder, cache.limit)
    again.prepare()
    assert again.read(shard, str(path), 5, 3 * PIECE, None) == path.read_bytes()[5:][: 3 * PIECE]
    assert again.size() > 3 * PIECE


def test_a_lock_that_another_process_keeps_is_not_waited_for(tmp_path, shard, cache):
    import sqlite3

    [books] = (tmp_path / "cache").rglob("cache.db")
    path = tmp_path / "shard.tar"
    with contextlib.closing(sqlite3.connect(books)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        assert cache.read(shard, str(path), 5, 100, None) == path.read_bytes()[5:105]
        assert time.monotonic() - begin < 10


def test_nothing_is_unpickled(tmp_path, shard, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import diskcache

    with diskcache.Cache(str(tmp_path / "cache" / OWN_FOLDER)) as other:
        other.set(f"{shard.sha256}/0", Trap())
    path = tmp_path / "shard.tar"
    assert cache.read(shard, str(path), 5, 100, None) == path.read_bytes()[5:105]
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache cannot be used"):
        RangeCache(str(tmp_path / "file" / "cache"), PIECE).prepare()
    with pytest.raises(UserError, match=r"data\.cache_gb: 100 bytes are too few"):
        RangeCache(str(tmp_path), 100)
    with pytest.raises(UserError, match=r"data\.cache_dir is gs://b/c; it must be a folder on a l"):
        RangeCache("gs://b/c", PIECE)


def test_a_full_disk_is_done_without(tmp_path, shard):
    cache = RangeCache(str(tmp_path / "cache"), 100 * PIECE)
    cache.prepare()
    path = tmp_path / "shard.tar"
    # A limit on the size of files fails a write as a full disk does.
    code = (
        "import resource, signal, sys; from rae_xla.data.cache import RangeCache;"
        "from rae_xla.data.index import Shard; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "cache = RangeCache(sys.argv[1], 10**9); cache.size();"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"shard = Shard('shard.tar', 1, {SIZE}, 'ab' * 32);"
        "sys.stdout.buffer.write(cache.read(shard, sys.argv[2], 5, 3000000, None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache"), str(path)],
        capture_output=True,
        check=False,
    )
    assert done.stdout == path.read_bytes()[5:3000005], done.stderr.decode()
