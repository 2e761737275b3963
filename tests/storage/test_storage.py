"""The storage interface on a local disk, through fsspec, and in a bucket."""

import pytest

from rae_xla import storage


def sizes(folder):
    return {name: info.size for name, info in storage.list_files(folder).items()}


@pytest.fixture(params=["local", "remote", "bucket"])
def folder(request, tmp_path):
    """A folder on disk, one through fsspec, and one in a bucket."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    if request.param == "local":
        return str(tmp_path / "folder")
    return f"file://{tmp_path}/folder"


@pytest.fixture
def file(folder):
    storage.make_folder(folder)
    path = storage.join(folder, "file.bin")
    storage.write_bytes(path, b"0123456789")
    return path


def test_reading_a_written_file(file):
    assert storage.exists(file)
    assert storage.size(file) == 10
    assert storage.read_bytes(file) == b"0123456789"
    with storage.open_read(file) as opened:
        assert (opened.read(3), opened.read(3)) == (b"012", b"345")


def test_a_range_ends_at_the_end_of_the_file(file):
    assert storage.read_range(file, 3, 4) == b"3456"
    assert storage.read_range(file, 8, 4) == b"89"


def test_listing_and_removing(folder, file):
    storage.write_bytes(storage.join(folder, "other"), b"abc")
    storage.make_folder(storage.join(folder, "below"))
    assert sizes(folder) == {"file.bin": 10, "other": 3}
    assert storage.is_folder(folder)
    assert not storage.is_folder(file)
    storage.remove(file)
    assert sizes(folder) == {"other": 3}
    assert not storage.exists(file)


def test_a_failed_write_leaves_only_the_old_file(folder, file):
    def fail() -> None:
        with storage.create(file) as opened:
            opened.write(b"partial")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert storage.read_bytes(file) == b"0123456789"
    assert sizes(folder) == {"file.bin": 10}


def test_a_missing_file_is_a_file_not_found_error(folder):
    missing = storage.join(folder, "missing")
    for read in (storage.read_bytes, storage.size, lambda path: storage.read_range(path, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read(missing)


@pytest.mark.parametrize(
    ("path", "parts"),
    [("gs://bucket/a/index.json", ("gs://bucket/a", "index.json")), ("/a/b", ("/a", "b"))],
)
def test_split_undoes_join(path, parts):
    assert storage.split(path) == parts
    assert storage.join(*parts) == path
