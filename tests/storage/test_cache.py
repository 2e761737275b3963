"""The disk cache: correct ranges, its size limit, crashes and damage."""

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

from rae_xla import storage
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.shards.index import Shard
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.storage.cache import PIECE_BYTES, SUBFOLDER, RangeCache

pytestmark = pytest.mark.slow

SIZE = 5 * PIECE_BYTES + 12_345


def write_random(path: Path, size: int = SIZE) -> Shard:
    path.write_bytes(np.random.default_rng(0).bytes(size))
    return Shard(path.name, 1, size, "ab" * 32)


@pytest.fixture
def shard(tmp_path):
    return write_random(tmp_path / "shard.tar")


@pytest.fixture
def cache(tmp_path):
    cache = RangeCache(str(tmp_path / "cache"), 100 * PIECE_BYTES)
    cache.prepare()
    return cache


RANGES = [
    (0, 10),
    (PIECE_BYTES - 5, 10),
    (0, SIZE),
    (SIZE - 7, 7),
    (2 * PIECE_BYTES, PIECE_BYTES),
    (3, 4 * PIECE_BYTES),
]


@pytest.mark.parametrize(("start", "length"), RANGES)
def test_a_range_has_the_bytes_of_the_shard_and_is_read_from_it_once(
    tmp_path, shard, cache, start, length
):
    path = tmp_path / "shard.tar"
    expected = path.read_bytes()[start : start + length]
    assert cache.read(shard, str(path), start, length, None) == expected
    path.unlink()
    assert cache.read(shard, str(path), start, length, None) == expected


def test_only_missing_pieces_are_read_in_as_few_requests_as_possible(
    tmp_path, shard, cache, monkeypatch
):
    path, requested = str(tmp_path / "shard.tar"), []
    real = storage.read_range

    def counting(path, start, length, generation=None):
        requested.append((start // PIECE_BYTES, length // PIECE_BYTES))
        return real(path, start, length, generation)

    monkeypatch.setattr(storage, "read_range", counting)
    cache.read(shard, path, 2 * PIECE_BYTES, PIECE_BYTES, None)
    cache.read(shard, path, 0, SIZE, None)
    assert requested == [(2, 1), (0, 2), (3, 3)]


def test_a_partial_piece_of_a_truncated_shard_is_not_cached(tmp_path, shard, cache):
    path = tmp_path / "shard.tar"
    os.truncate(path, PIECE_BYTES + 100)
    assert len(cache.read(shard, str(path), PIECE_BYTES, 200, None)) == 100
    write_random(path)  # restore it
    assert (
        cache.read(shard, str(path), PIECE_BYTES, 200, None)
        == path.read_bytes()[PIECE_BYTES:][:200]
    )


def test_the_folder_stays_below_its_limit(tmp_path):
    cache = RangeCache(str(tmp_path / "cache"), 8 * PIECE_BYTES)
    cache.prepare()
    path = tmp_path / "large.tar"
    shard = write_random(path, 40 * PIECE_BYTES)
    for number in range(40):
        cache.read(shard, str(path), number * PIECE_BYTES, PIECE_BYTES, None)
        on_disk = sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file())
        assert on_disk <= 10 * PIECE_BYTES  # a piece being stored, and the database
    recent = cache.read(shard, str(path), 39 * PIECE_BYTES, PIECE_BYTES, None)
    path.unlink()
    assert cache.read(shard, str(path), 39 * PIECE_BYTES, PIECE_BYTES, None) == recent
    with pytest.raises(FileNotFoundError):
        cache.read(shard, str(path), 0, PIECE_BYTES, None)


def test_it_pickles(cache, shard, tmp_path):
    path = str(tmp_path / "shard.tar")
    expected = cache.read(shard, path, 5, 100, None)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(cache.read, [(shard, path, 5, 100, None)] * 4) == [expected] * 4


STORING = """
import sys
from rae_xla.storage.cache import PIECE_BYTES, RangeCache
from rae_xla.data.shards.index import Shard

cache = RangeCache(sys.argv[1], 1000 * PIECE_BYTES)
print("ready", flush=True)
shard = Shard("shard.tar", 1, 400 * PIECE_BYTES, "ab" * 32)
for number in range(400):
    cache.read(shard, sys.argv[2], number * PIECE_BYTES, PIECE_BYTES, None)
"""


def test_killed_processes_leave_a_consistent_cache(tmp_path):
    path, folder = tmp_path / "large.tar", tmp_path / "cache"
    shard = write_random(path, 400 * PIECE_BYTES)
    for wait in (0.02, 0.1, 0.25):
        process = subprocess.Popen(
            [sys.executable, "-c", STORING, str(folder), str(path)], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = RangeCache(str(folder), 1000 * PIECE_BYTES)
    cache.prepare()
    content = path.read_bytes()
    assert cache.read(shard, str(path), 0, len(content), None) == content
    in_database = cache.size()
    on_disk = sum(f.stat().st_size for f in folder.rglob("*.val"))
    assert on_disk == pytest.approx(in_database, rel=0.02)  # no file is unknown to the database


def test_batches_are_the_same_through_a_cache(make_shards, tmp_path, cache):
    index = make_shards(100)

    def take_batches(workers, cache):
        loader = TrainingLoader(
            index, seed=5, global_batch_size=16, transform=CenterCrop(8), num_workers=workers,
            cache=cache,
        )  # fmt: skip
        batches = loader.batches(3)
        taken = list(islice(batches, 8))
        batches.close()
        return taken

    clean = take_batches(0, None)
    for workers in (0, 2):
        for batch, expected in zip(take_batches(workers, cache), clean, strict=True):
            assert torch.equal(batch["image"], expected["image"])
    for shard in index.shards:
        os.remove(index.path_of(shard))
    for batch, expected in zip(take_batches(2, cache), clean, strict=True):
        assert torch.equal(batch["image"], expected["image"])


def test_a_damaged_piece_is_read_again_from_the_shard(make_shards, cache, tmp_path):
    index = make_shards(100)

    def take_batches():
        loader = TrainingLoader(
            index, seed=5, global_batch_size=16, transform=CenterCrop(8), cache=cache
        )
        batches = loader.batches()
        taken = list(islice(batches, 6))
        batches.close()
        return taken

    clean = take_batches()
    for piece in (tmp_path / "cache").rglob("*.val"):
        piece.write_bytes(bytes(piece.stat().st_size))
    for batch, expected in zip(take_batches(), clean, strict=True):
        assert torch.equal(batch["image"], expected["image"])


def test_other_files_in_the_folder_are_not_touched(tmp_path, shard):
    other = tmp_path / "ssd" / "thesis" / "chapter1.tex"
    other.parent.mkdir(parents=True)
    other.write_text("the only copy")
    cache = RangeCache(str(tmp_path / "ssd"), 100 * PIECE_BYTES)
    cache.prepare()
    cache.read(shard, str(tmp_path / "shard.tar"), 0, SIZE, None)
    cache.prepare()
    assert other.read_text() == "the only copy"
    assert cache.size() > SIZE


def test_a_damaged_database_is_replaced(tmp_path, shard, cache):
    path = tmp_path / "shard.tar"
    cache.read(shard, str(path), 0, SIZE, None)
    [database] = (tmp_path / "cache").rglob("cache.db")
    for leftover in database.parent.glob("cache.db-*"):
        leftover.unlink()
    content = bytearray(database.read_bytes())
    content[:4000] = b"\xff" * 4000
    database.write_bytes(content)
    again = RangeCache(cache.folder, cache.limit)
    again.prepare()
    assert (
        again.read(shard, str(path), 5, 3 * PIECE_BYTES, None)
        == path.read_bytes()[5:][: 3 * PIECE_BYTES]
    )
    assert again.size() > 3 * PIECE_BYTES


def test_a_lock_of_another_process_does_not_block(tmp_path, shard, cache):
    import sqlite3

    [database] = (tmp_path / "cache").rglob("cache.db")
    path = tmp_path / "shard.tar"
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        begin = time.monotonic()
        assert cache.read(shard, str(path), 5, 100, None) == path.read_bytes()[5:105]
        assert time.monotonic() - begin < 10


def test_nothing_is_unpickled(tmp_path, shard, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import diskcache

    with diskcache.Cache(str(tmp_path / "cache" / SUBFOLDER)) as other:
        other.set(f"{shard.sha256}/0", Trap())
    path = tmp_path / "shard.tar"
    assert cache.read(shard, str(path), 5, 100, None) == path.read_bytes()[5:105]
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_an_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file/cache cannot be used"):
        RangeCache(str(tmp_path / "file" / "cache"), PIECE_BYTES).prepare()
    with pytest.raises(UserError, match=r"data\.cache_gb: 100 bytes are too few"):
        RangeCache(str(tmp_path), 100)
    with pytest.raises(UserError, match=r"data\.cache_dir is gs://b/c; it must be a folder on a l"):
        RangeCache("gs://b/c", PIECE_BYTES)


def test_a_full_disk_disables_the_cache(tmp_path, shard):
    cache = RangeCache(str(tmp_path / "cache"), 100 * PIECE_BYTES)
    cache.prepare()
    path = tmp_path / "shard.tar"
    # A limit on the size of files fails a write as a full disk does.
    code = (
        "import resource, signal, sys; from rae_xla.storage.cache import RangeCache;"
        "from rae_xla.data.shards.index import Shard;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
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
