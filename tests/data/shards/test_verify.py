"""Damaged shards: ``verify`` reports every fault, and ``open_index`` does not accept them."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.index import SAMPLE, open_index
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import write_shards
from rae_xla.errors import UserError


@pytest.fixture
def folder(make_shards) -> Path:
    """100 samples in shards of 30, 30, 30 and 10."""
    return Path(make_shards(100).folder)


def _faults(folder: Path) -> list[str]:
    return [str(fault) for fault in verify(str(folder))]


def _rewrite(path: Path, change) -> None:
    """Rewrite a shard with ``change(name, content)`` for every member; None drops it."""
    buffer = io.BytesIO()
    with (
        tarfile.open(path) as old,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old:
            content = change(member.name, old.extractfile(member).read())
            if content is not None:
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())


def test_intact_shards_have_no_fault(folder):
    done = []
    assert verify(str(folder), progress=done.append) == []
    assert verify(str(folder / "index.json")) == []
    assert sum(done) == 100


def test_a_missing_shard(folder):
    (folder / "shard-000001.tar").unlink()
    assert _faults(folder) == ["shard-000001.tar: missing"]
    with pytest.raises(UserError, match=r"does not match its shards: shard-000001\.tar is missing"):
        open_index(str(folder))


def test_an_empty_shard(folder):
    (folder / "shard-000001.tar").write_bytes(b"")
    [fault] = _faults(folder)
    assert fault.startswith("shard-000001.tar: empty: 0 bytes, the index lists")
    with pytest.raises(UserError, match=r"shard-000001\.tar is empty"):
        open_index(str(folder))


def test_a_truncated_shard(folder):
    os.truncate(folder / "shard-000002.tar", 20_000)
    faults = _faults(folder)
    assert faults[0].startswith("shard-000002.tar: truncated: 20000 bytes, the index lists")
    assert "complete samples, the index lists 30" in faults[-1]
    with pytest.raises(UserError, match=r"shard-000002\.tar is truncated: 20000 bytes"):
        open_index(str(folder))


def test_a_shard_truncated_between_two_samples(folder):
    """``tarfile`` reads such a tar without an error."""
    path = folder / "shard-000000.tar"
    offset = int(np.load(folder / "samples.npy")["offset"][12]) - tarfile.BLOCKSIZE
    os.truncate(path, offset)
    assert _faults(folder)[1:] == [
        "shard-000000.tar: not a complete tar after 12 samples "
        "(truncated, or garbage, at byte 24,576)",
        "shard-000000.tar: has 12 complete samples, the index lists 30",
    ]


def test_bytes_that_changed(folder):
    offset = int(np.load(folder / "samples.npy")["offset"][45])
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.seek(offset + 45)
        file.write(b"!!!!")
    open_index(str(folder))  # the size is right, so only reading finds it
    faults = _faults(folder)
    assert "sample 45 (000000045): the image changed after the index was written" in faults[0]
    assert "changed after the index was written (its SHA-256 differs)" in faults[-1]


def test_a_shard_that_became_longer(folder):
    with open(folder / "shard-000003.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"shard-000003\.tar is too long"):
        open_index(str(folder))
    assert _faults(folder)[0].startswith("shard-000003.tar: too long")


def test_labels_and_images_changed_inside_a_shard(folder):
    changes = {
        "000000001.cls": b"7",
        "000000002.cls": b"cat",
        "000000003.cls": b"0",
        "000000004.cls": None,
        "000000005.png": b"not a PNG",
        "000000006.png": None,
    }
    _rewrite(folder / "shard-000000.tar", lambda name, content: changes.get(name, content))
    faults = "\n".join(_faults(folder))
    for expected in [
        "sample 1 (000000001): label 7 is out of range (0 to 4)",
        "sample 2 (000000002): the label b'cat' is not a number",
        "sample 3 (000000003): label 0, the index lists 3",
        "sample 4 (000000004): the label is missing (no .cls member)",
        "sample 5 (000000005): the image does not decode",
        "sample 6 (000000006): the image is missing",
    ]:
        assert expected in faults


def test_an_image_that_never_decoded(tmp_path):
    write_shards([ShardSample(b"garbage", "png", 0)], str(tmp_path / "out"))
    [fault] = _faults(tmp_path / "out")
    assert "sample 0 (000000000): the image does not decode" in fault


def test_a_shard_that_is_not_in_the_index(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000009.tar")
    assert _faults(folder) == ["shard-000009.tar: is in the folder but not in the index"]


def test_samples_too_many(folder):
    """Only in a tar of another size can there be more, or less, than was indexed."""
    path = folder / "shard-000003.tar"
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("000000100.cls"), io.BytesIO())
    assert "shard-000003.tar: has 11 complete samples, the index lists 10" in _faults(folder)


def test_several_processes_find_the_same(folder):
    (folder / "shard-000000.tar").unlink()
    os.truncate(folder / "shard-000002.tar", 10_000)
    done = []
    faults = verify(str(folder), progress=done.append, workers=2)
    assert [str(fault) for fault in faults] == _faults(folder)
    assert sum(done) == 100


def test_a_wrong_md5_in_the_index(folder):
    """It would not match the listing of a bucket, although the shard is intact."""
    manifest = json.loads((folder / "index.json").read_text())
    manifest["shards"][1]["md5"] = "0" * 32
    (folder / "index.json").write_text(json.dumps(manifest))
    [fault] = _faults(folder)
    assert fault.startswith("shard-000001.tar: has the right content, but another MD5")


def test_all_faults_are_reported_at_once(folder):
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000001.tar").write_bytes(b"")
    os.truncate(folder / "shard-000002.tar", 10_000)
    files = {fault.split(":")[0] for fault in _faults(folder)}
    assert files == {f"shard-00000{i}.tar" for i in range(3)}
    with pytest.raises(UserError) as caught:
        open_index(str(folder))
    assert all(f"shard-00000{i}.tar is " in str(caught.value) for i in range(3))
    assert "\n" not in str(caught.value)


def test_the_index_of_other_shards(tmp_path, make_shards):
    one, two = Path(make_shards(100).folder), Path(make_shards(80, "other").folder)
    shutil.copy(two / "index.json", one / "index.json")
    with pytest.raises(UserError, match=r"samples\.npy is not the table that index\.json"):
        open_index(str(one))
    shutil.copy(two / "samples.npy", one / "samples.npy")
    with pytest.raises(UserError, match="the index does not match its shards"):
        open_index(str(one))


class TestIndexFile:
    def _edit(self, folder: Path, **changes) -> str:
        manifest = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(manifest | changes))
        return str(folder)

    def test_missing(self, tmp_path, folder):
        with pytest.raises(UserError, match="nowhere: no such folder"):
            open_index(str(tmp_path / "nowhere"))
        (folder / "index.json").unlink()
        with pytest.raises(UserError, match=r"not a \(finished\) folder of shards"):
            open_index(str(folder))

    def test_damaged(self, folder):
        (folder / "index.json").write_text('{"format": "rae-xla shards", "ver')
        with pytest.raises(UserError, match=r"index\.json: not a readable index"):
            open_index(str(folder))
        (folder / "index.json").write_text("[]")
        with pytest.raises(UserError, match=r"index\.json: not a readable index"):
            open_index(str(folder))

    def test_of_another_kind_or_version(self, folder):
        with pytest.raises(
            UserError, match="version 9 of the index; this rae_xla reads versions up to 2"
        ):
            open_index(self._edit(folder, version=9))
        with pytest.raises(UserError, match="the format is 'other'"):
            open_index(self._edit(folder, format="other"))

    def test_without_its_table(self, folder):
        (folder / "samples.npy").unlink()
        with pytest.raises(UserError, match=r"samples\.npy is missing"):
            open_index(str(folder))

    def test_counts_that_do_not_add_up(self, folder):
        shards = json.loads((folder / "index.json").read_text())["shards"]
        with pytest.raises(UserError, match=r"90 in the shards.*100 in the table"):
            open_index(self._edit(folder, shards=shards[:-1]))

    def test_edited_by_hand(self, folder):
        with pytest.raises(UserError, match="99 in total, 100 in the table"):
            open_index(self._edit(folder, samples=99))
        shards = json.loads((folder / "index.json").read_text())["shards"]
        with pytest.raises(UserError, match=r"index\.json: not a readable index"):
            open_index(self._edit(folder, shards=[shards[0] | {"samples": "x"}, *shards[1:]]))

    def test_labels_out_of_range(self, folder):
        table = np.load(folder / "samples.npy")
        table["label"][7] = -3
        buffer = io.BytesIO()
        np.save(buffer, table.astype(SAMPLE))
        (folder / "samples.npy").write_bytes(buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        with pytest.raises(UserError, match="label -3 of sample 7 is out of range"):
            open_index(self._edit(folder, table={"file": "samples.npy", "sha256": digest}))

    def test_more_labels_than_classes(self, folder):
        with pytest.raises(UserError, match="label 2 of sample 2 is out of range"):
            open_index(self._edit(folder, classes=["a", "b"]))
