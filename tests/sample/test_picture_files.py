import threading
from pathlib import Path

import numpy as np
import pytest

from rae_xla.sample import picture_files
from rae_xla.sample.picture_files import PictureFiles, PictureWriter, write_npz

COUNT = 7


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(picture_files, "SHARD", 3)


def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 5, 6, 3), dtype=np.uint8)


def write(files, numbers=range(COUNT)):
    files.make_folders()
    with PictureWriter(workers=2) as writer:
        for i in numbers:
            writer.write(files.path(i), pictures()[i])


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("flat", [f"{i:06d}.png" for i in range(COUNT)]),
        ("folders", [f"{i // 3:03d}/{i:06d}.png" for i in range(COUNT)]),
        ("tar", ["000.tar", "001.tar", "002.tar"]),
    ],
)
def test_each_layout_gives_the_pictures_back_in_order(tmp_path, layout, names):
    files = PictureFiles(tmp_path, layout, COUNT)
    write(files, [0, 6])
    assert files.found() == {0, 6}
    write(files)
    files.pack()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == names
    assert files.found() == set(range(COUNT))
    assert np.array_equal(np.stack(list(files.pictures(workers=2))), pictures())


def test_packing_that_was_killed_is_done_again(tmp_path):
    files = PictureFiles(tmp_path, "tar", COUNT)
    write(files)
    files.pack()
    packed = (tmp_path / "001.tar").read_bytes()
    # killed in the tar, then while the folder was removed
    (tmp_path / "001.tar").unlink()
    (tmp_path / "001.tar.unfinished").write_bytes(packed[:700])
    write(files, [3, 4, 5])
    assert files.found() == set(range(COUNT))
    files.pack()
    write(files, [4])
    files.pack()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.tar", "001.tar", "002.tar"]
    assert np.array_equal(np.stack(list(files.pictures(workers=1))), pictures())


def test_the_npz_is_what_numpy_would_write_and_is_written_as_pictures_come(tmp_path):
    path = tmp_path / "samples.npz"
    unfinished = tmp_path / "samples.npz.unfinished"
    big = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    sizes = []

    def one_by_one():
        for picture in big:
            sizes.append(unfinished.stat().st_size)
            yield picture

    write_npz(path, one_by_one(), big.shape, np.arange(6))
    # when one is asked for, all before it have gone to the file, but for its buffer
    assert all(size > i * big[0].size - 2**16 for i, size in enumerate(sizes))
    assert not unfinished.exists()
    with np.load(path) as arrays:
        assert np.array_equal(arrays["arr_0"], big)
        assert arrays["labels"].tolist() == list(range(6))


def test_reading_back_holds_a_few_pictures_only(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_files, "_BLOCK", 2)
    files = PictureFiles(tmp_path, "flat", COUNT)
    write(files)
    read = []
    monkeypatch.setattr(files, "read", lambda i: read.append(i) or files.path(i).read_bytes())
    for given, _ in enumerate(files.pictures(workers=2), start=1):
        assert len(read) <= given + 2


def test_the_writer_waits_for_slow_disks_and_tells_what_went_wrong(tmp_path, monkeypatch):
    free, running = threading.Semaphore(0), []

    def slow(path, pixels):
        running.append(path)
        free.acquire()
        if path == Path("bad"):
            raise OSError("disk full")

    monkeypatch.setattr(picture_files, "save_png", slow)
    writer = PictureWriter(workers=1)
    for i in range(64):
        writer.write(Path(str(i)), pictures()[0])
    one_more = threading.Thread(target=writer.write, args=(Path("bad"), pictures()[0]))
    one_more.start()
    one_more.join(timeout=0.05)
    assert one_more.is_alive()
    free.release(65)
    one_more.join()
    with pytest.raises(OSError, match="disk full"):
        writer.__exit__(None, None, None)
