"""Image files of a sample set: layouts, packing, the .npz, and the writer."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rae_xla.config.paths import StoragePath
from rae_xla.errors import UserError
from rae_xla.sample import image_files
from rae_xla.sample.image_files import ImageFiles, ImageWriter, write_npz
from rae_xla.sample.sample_set import claim_folder

COUNT = 7


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(image_files, "SHARD", 3)


def random_images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (COUNT, 5, 6, 3), dtype=np.uint8)


def write(files, indices=range(COUNT)):
    files.make_folders()
    with ImageWriter(workers=2) as writer:
        for i in indices:
            writer.write(files.path(i), random_images()[i])


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("flat", [f"{i:06d}.png" for i in range(COUNT)]),
        ("folders", [f"{i // 3:03d}/{i:06d}.png" for i in range(COUNT)]),
        ("tar", ["000.tar", "001.tar", "002.tar"]),
    ],
)
def test_each_layout_returns_the_images_in_order(tmp_path, layout, names):
    files = ImageFiles(tmp_path, layout, COUNT)
    write(files, [0, 6])
    assert files.existing() == {0, 6}
    write(files)
    files.pack()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == names
    assert files.existing() == set(range(COUNT))
    assert np.array_equal(np.stack(list(files.images(workers=2))), random_images())


def test_interrupted_packing_is_completed(tmp_path):
    files = ImageFiles(tmp_path, "tar", COUNT)
    write(files)
    files.pack()
    packed = (tmp_path / "001.tar").read_bytes()
    # killed while the tar was written, then while the folder was removed
    (tmp_path / "001.tar").unlink()
    (tmp_path / "001.tar.unfinished").write_bytes(packed[:700])  # by an earlier version
    (tmp_path / "001.tar.tmp-0a1b2c3d").write_bytes(packed[:700])
    write(files, [3, 4, 5])
    assert files.existing() == set(range(COUNT))
    files.pack()
    write(files, [4])
    files.pack()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000.tar", "001.tar", "002.tar"]
    assert np.array_equal(np.stack(list(files.images(workers=1))), random_images())


def test_npz_equals_that_of_numpy_and_is_written_image_by_image(tmp_path):
    path = tmp_path / "samples.npz"
    (tmp_path / "samples.npz.tmp-0a1b2c3d").write_bytes(b"left by a killed process")
    big = np.random.default_rng(0).integers(0, 256, (6, 128, 128, 3), dtype=np.uint8)
    sizes = []

    def one_by_one():
        for image in big:
            [unfinished] = tmp_path.glob("samples.npz.tmp-*")
            sizes.append(unfinished.stat().st_size)
            yield image

    write_npz(path, one_by_one(), big.shape, np.arange(6))
    # when an image is requested, the earlier ones are in the file, except for its buffer
    assert all(size > i * big[0].size - 2**16 for i, size in enumerate(sizes))
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(path) as arrays:
        assert np.array_equal(arrays["arr_0"], big)
        assert arrays["labels"].tolist() == list(range(6))


def test_reading_keeps_only_a_block_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_READ_BLOCK", 2)
    files = ImageFiles(tmp_path, "flat", COUNT)
    write(files)
    read = []
    monkeypatch.setattr(files, "read", lambda i: read.append(i) or Path(files.path(i)).read_bytes())
    for yielded, _ in enumerate(files.images(workers=2), start=1):
        assert len(read) <= yielded + 2


def test_a_damaged_image_is_named(tmp_path):
    for layout, where in (("flat", r"flat/000001\.png"), ("tar", r"tar/000\.tar: 000001\.png")):
        files = ImageFiles(tmp_path / layout, layout, COUNT)
        write(files)
        path = Path(files.path(1))
        path.write_bytes(path.read_bytes()[:60])
        files.pack()
        with pytest.raises(UserError, match=f"{where}: not a readable image"):
            list(files.images(workers=1))


def test_writer_waits_for_a_slow_disk_and_raises_its_errors(tmp_path, monkeypatch):
    free, running = threading.Semaphore(0), []

    def slow(path, pixels):
        running.append(path)
        free.acquire()
        if path == Path("bad"):
            raise OSError("disk full")

    monkeypatch.setattr(image_files, "save_png", slow)
    writer = ImageWriter(workers=1)
    for i in range(64):
        writer.write(Path(str(i)), random_images()[0])
    one_more = threading.Thread(target=writer.write, args=(Path("bad"), random_images()[0]))
    one_more.start()
    one_more.join(timeout=0.05)
    assert one_more.is_alive()
    free.release(65)
    one_more.join()
    with pytest.raises(OSError, match="disk full"):
        writer.__exit__(None, None, None)


def test_images_without_settings_do_not_become_part_of_a_set(tmp_path):
    """They may be the user's own photographs, or of a set with other settings."""
    backend = SimpleNamespace(process_index=0, all_gather_text=lambda text: [text])

    def claim(folder):
        files = ImageFiles(folder, "flat", COUNT)
        claim_folder(StoragePath(folder), {}, backend, lambda _: bool(files.existing()))

    claim(tmp_path / "new")
    write(ImageFiles(tmp_path / "new", "flat", COUNT), [0])
    claim(tmp_path / "new")
    (tmp_path / "new/settings.json").unlink()
    with pytest.raises(UserError, match=r"but no settings\.json.*another --out"):
        claim(tmp_path / "new")
