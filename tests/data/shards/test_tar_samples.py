"""Every member and every byte of a tar is a sample, a fault, or counted."""

import io
import tarfile

import pytest
from foreign_tars import jpeg, write_tar

from rae_xla.data.image_finder import LeftOut
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.sources import open_image_source
from rae_xla.data.shards.tar_samples import (
    DamagedTarError,
    HashingReader,
    read_samples,
    scan_images,
    scan_samples,
)
from rae_xla.data.shards.verify import verify
from rae_xla.errors import UserError


def sample(key, label=b"0"):
    return [(f"{key}.jpg", jpeg(0)), (f"{key}.cls", label)]


def both_ways(content):
    """Read a tar as a stream and by seeking; return the keys, the fault and what is left out."""
    results = []
    for read, file in (
        (read_samples, HashingReader(io.BytesIO(content))),
        (scan_samples, io.BytesIO(content)),
    ):
        keys, left_out, fault = [], LeftOut(), None
        try:
            keys += (found.key for found in read(file, left_out))
        except DamagedTarError as error:
            fault = error.describe(len(keys))
        results.append((keys, fault, left_out))
    assert results[0] == results[1]
    return results[0]


def test_data_after_the_end(tmp_path):
    for name, key in (("a", "0"), ("b", "1")):
        write_tar(tmp_path / name, sample(key))
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    assert both_ways(a)[1] is None
    assert both_ways(a + bytes(700_000))[1] is None
    keys, fault, _ = both_ways(a + b)
    assert keys == ["0"]
    assert (
        f"another tar, as after `cat a.tar b.tar`, after the end of the archive, at byte {len(a):,}"
        in fault
    )
    for gap in (0, 1, 300_000, 3_000_000):
        keys, fault, _ = both_ways(a + bytes(gap) + b"x")
        assert keys == ["0"]
        assert f"data after the end of the archive, at byte {len(a) + gap:,}:" in fault
        assert fault.endswith("(1 samples before it)")


def test_index_make_and_verify_refuse_a_concatenated_tar(tmp_path):
    write_tar(tmp_path / "one" / "x.tar", sample("0"))
    index_shards(str(tmp_path / "one"))
    write_tar(tmp_path / "x", sample("1"))
    with (tmp_path / "one" / "x.tar").open("ab") as file:
        file.write((tmp_path / "x").read_bytes())
    faults = [str(fault) for fault in verify(str(tmp_path / "one"))]
    assert any("x.tar: another tar" in fault for fault in faults)
    for name in ("index.json", "samples.npy"):
        (tmp_path / "one" / name).unlink()
    for command in (index_shards, open_image_source):
        with pytest.raises(UserError, match=r"another tar.* at byte 10,240"):
            command(str(tmp_path / "one"))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["x.tar"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08" + bytes(600), "it is not a plain tar, but compressed with gzip"),
        (b"PK\x03\x04" + bytes(600), "it is not a plain tar, but a zip file"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
    ],
)
def test_what_is_not_a_tar(content, message):
    assert message in both_ways(content)[1]


def with_members(*members):
    """Return a tar of (name, type, content or target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content.decode()
                tar.addfile(info)
    return buffer.getvalue()


FILE = tarfile.REGTYPE


def test_members_that_are_not_used_are_counted():
    content = with_members(
        ("./d", tarfile.DIRTYPE, b""),
        ("./d/a.jpg", FILE, b"x"),
        ("./d/a.cls", FILE, b"0"),
        ("./d/a.json", FILE, b"{}"),
        ("d/._a.jpg", FILE, b"x"),
        (".thumbs/b.jpg", FILE, b"x"),
        ("README", FILE, b"x"),
        ("link.txt", tarfile.SYMTYPE, b"README"),
        ("pipe", tarfile.FIFOTYPE, b""),
    )
    keys, fault, left_out = both_ways(content)
    assert fault is None
    assert "./d/a" in keys
    assert left_out.counts == {
        ".json": 1, "hidden": 2, "without extension": 1, ".txt": 1, "special member": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, r"its \.jpg is a hard link to a\.jpg: .*--hard-dereference"),
        (tarfile.SYMTYPE, r"its \.jpg is a symbolic link to a\.jpg: .*--dereference"),
    ],
)
def test_an_image_that_is_a_link_is_a_fault(tmp_path, kind, message):
    first = [("a.jpg", FILE, jpeg(0)), ("a.cls", FILE, b"0")]
    for number, second in enumerate(([("b.jpg", kind, b"a.jpg"), ("b.cls", FILE, b"0")],
                                     [("b.jpg", kind, b"a.jpg")])):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.tar").write_bytes(with_members(*first, *second))
        for command in (index_shards, open_image_source):
            with pytest.raises(UserError, match=f"sample b: {message}"):
                command(str(folder))


def test_members_that_are_not_next_to_each_other(tmp_path):
    members = [member for key in "abc" for member in sample(key)]
    members.sort(key=lambda member: member[0][2:])
    write_tar(tmp_path / "x.tar", members)
    for command in (index_shards, open_image_source):
        with pytest.raises(
            UserError, match=r"the members of 3 samples \(the first is a\).*--sort=name"
        ):
            command(str(tmp_path))


def test_names_with_two_dots(tmp_path):
    write_tar(tmp_path / "x.tar", sample("cfg1.5_0"))
    with pytest.raises(UserError, match=r"only \.5_0\.jpg, \.5_0\.cls\): WebDataset ends the key"):
        index_shards(str(tmp_path))
    left_out = LeftOut()
    with (tmp_path / "x.tar").open("rb") as file:
        [image] = scan_images(file, left_out)
    assert image.name == "cfg1.5_0.jpg"
    assert left_out.counts == {".cls": 1}
    assert (tmp_path / "x.tar").read_bytes()[image.offset :][: image.size] == jpeg(0)


def test_images_that_are_not_read_have_a_hint(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.dng", b"x"), ("a.cls", b"0")])
    with pytest.raises(UserError, match=r"only \.dng, \.cls\): a raw file: convert it"):
        index_shards(str(tmp_path))


def test_commands_log_what_they_leave_out(tmp_path, caplog):
    caplog.set_level("INFO")
    write_tar(tmp_path / "x.tar", [*sample("a"), ("a.json", b"{}")])
    (tmp_path / "notes.txt").touch()
    (tmp_path / "more").mkdir()
    open_image_source(str(tmp_path))
    assert "left out 1 .txt (notes.txt), 1 folder (more)" in caplog.text
    assert "members of the tars: left out " in caplog.text
    assert "1 .json (a.json)" in caplog.text
    caplog.clear()
    index_shards(str(tmp_path))
    assert "members of the tars: left out" in caplog.text
    caplog.clear()
    assert verify(str(tmp_path)) == []
    assert "1 .json (a.json)" in caplog.text
    assert "left out 1 .txt (notes.txt), 1 folder (more)" in caplog.text


def test_compressed_tars_are_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    for source in (tmp_path / "x.tar.gz", tmp_path):
        for command in (index_shards, open_image_source):
            with pytest.raises(UserError, match=r"x\.tar\.gz: the tar is compressed.*gunzip"):
                command(str(source))


def test_a_link_to_a_tar_that_is_gone(tmp_path):
    write_tar(tmp_path / "x.tar", sample("a"))
    (tmp_path / "y.tar").symlink_to("nowhere.tar")
    with pytest.raises(UserError, match=r"y\.tar: a link without a target"):
        index_shards(str(tmp_path))
