"""Writing and reading shards: sources, indexes, limits, and output folders."""

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset as wds
from numbered import numbered_arrays
from PIL import Image

from rae_xla.data.reader import load_sample, read_image
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.index import open_index, read_index
from rae_xla.data.shards.sources import array_source, folder_source, open_image_source
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError


def _write(source, out, **options):
    return write_shards(source, str(out), classes=source.classes, **options)


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def test_arrays_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    for shape in [(20, 6, 6), (20, 6, 6, 3)]:
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        labels = rng.integers(0, 4, 20)
        index = _write(array_source(images, labels, shuffle=False), tmp_path / str(len(shape)))
        assert index.samples["label"].tolist() == labels.tolist()
        expected = images if images.ndim == 4 else np.repeat(images[..., None], 3, -1)
        for sample in range(20):
            pixels = load_sample(index, sample, CenterCrop(6), (0, 0))
            np.testing.assert_array_equal(pixels, expected[sample])


def test_shuffling_mixes_the_classes_and_keeps_all_samples(tmp_path):
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1)
    index = _write(array_source(images, np.repeat(np.arange(10), 10)), tmp_path / "out")
    labels = index.samples["label"]
    assert (np.diff(labels) != 0).mean() > 0.7
    pixels = [int(load_sample(index, i, CenterCrop(1), (0, 0))[0, 0, 0]) for i in range(100)]
    assert sorted(pixels) == list(range(100))
    assert [pixel // 10 for pixel in pixels] == labels.tolist()


def test_equal_sources_give_equal_bytes_and_fingerprints(tmp_path, make_shards):
    one, two, longer = make_shards(50, "one"), make_shards(50, "two"), make_shards(51, "three")
    for name in ["shard-000000.tar", "shard-000001.tar", "samples.npy", "index.json"]:
        first, second = (tmp_path / folder / name for folder in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    assert one.fingerprint == two.fingerprint == read_index(one.folder).fingerprint
    assert one.fingerprint != longer.fingerprint


def test_the_fingerprint_depends_on_labels(tmp_path):
    samples = [ShardSample(_png(i), "png", i % 3) for i in range(6)]
    changed = [*samples[:5], ShardSample(samples[5].image, "png", 1)]
    names = ("a", "b", "c")
    one = write_shards(samples, str(tmp_path / "one"), classes=names)
    two = write_shards(changed, str(tmp_path / "two"), classes=names)
    assert one.fingerprint != two.fingerprint


def test_webdataset_reads_the_shards(make_shards):
    index = make_shards(70)
    urls = [index.path_of(shard) for shard in index.shards]
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(read) == 70
    for number, sample in enumerate(read):
        assert sample["cls"] == index.samples["label"][number]
        pixels = load_sample(index, number, CenterCrop(8), (0, 0))
        np.testing.assert_array_equal(np.asarray(sample["png"]), pixels)


def test_limits_of_a_shard(tmp_path, make_shards):
    assert [shard.samples for shard in make_shards(100, per_shard=30).shards] == [30, 30, 30, 10]
    samples = [ShardSample(b"x" * 3000, "png", 0) for _ in range(20)]
    for limit in (25_000, 3 * tarfile.RECORDSIZE, 3 * tarfile.RECORDSIZE - 1):
        out = tmp_path / str(limit)
        index = write_shards(samples, str(out), shard_size_bytes=limit)
        records = limit // tarfile.RECORDSIZE * tarfile.RECORDSIZE
        for shard in index.shards:
            assert (out / shard.file).stat().st_size == shard.bytes <= limit
        for shard in index.shards[:-1]:
            with tarfile.open(index.path_of(shard)) as tar:
                end = max(member.offset_data + member.size for member in tar)
            # Another sample (header, 3,000 bytes, header, label) and the end would not fit.
            assert end + 512 + 3072 + 1024 + 1024 > records
    large = [ShardSample(b"x" * 30_000, "png", 0)] * 2
    alone = write_shards(large, str(tmp_path / "large"), shard_size_bytes=100)
    assert [shard.samples for shard in alone.shards] == [1, 1]


def test_the_index_is_opened_by_its_folder_or_its_file(tmp_path, make_shards):
    index = make_shards(10)
    for path in (index.folder, index.folder + "/", index.folder + "/index.json"):
        assert open_index(path).fingerprint == index.fingerprint
    manifest = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert (manifest["samples"], manifest["labels"]) == (10, {"min": 0, "max": 4})


def test_shards_behind_a_url(tmp_path, make_shards):
    index = make_shards(40)
    source = array_source(*numbered_arrays(40), shuffle=False)
    remote = _write(source, f"file://{tmp_path}/out", samples_per_shard=30)
    assert remote.fingerprint == index.fingerprint
    assert read_image(remote, 33) == read_image(index, 33)
    assert verify(remote.folder) == []


class TestFolders:
    def test_classes_by_name_nested_images_and_every_mode(self, tmp_path, image_folder):
        source = folder_source(str(image_folder))
        index = _write(source, tmp_path / "out")
        assert index.class_names == ("cat", "dog", "emu")
        assert np.bincount(index.samples["label"]).tolist() == [2, 2, 2]
        assert verify(index.folder) == []
        for sample in range(len(index)):
            assert load_sample(index, sample, CenterCrop(16), (0, 0)).shape == (16, 16, 3)

    def test_files_are_stored_unchanged(self, tmp_path, image_folder):
        index = _write(folder_source(str(image_folder)), tmp_path / "out")
        stored = {read_image(index, sample) for sample in range(len(index))}
        kept = [path for path in image_folder.rglob("*") if path.suffix in (".JPEG", ".png")]
        assert {path.read_bytes() for path in kept if path.name[0] != "."} <= stored

    def test_resized_shards_give_the_crops_of_the_originals(self, tmp_path, image_folder):
        options = {"shuffle": False}
        original = _write(folder_source(str(image_folder), **options), tmp_path / "expected")
        small = _write(
            folder_source(str(image_folder), encoding=Encoding(16), **options), tmp_path / "small"
        )
        for sample in range(len(original)):
            with Image.open(io.BytesIO(read_image(small, sample))) as image:
                assert min(image.size) == 16
            np.testing.assert_array_equal(
                load_sample(small, sample, CenterCrop(16), (0, 0)),
                load_sample(original, sample, CenterCrop(16), (0, 0)),
            )

    def test_workers_write_the_same_shards(self, tmp_path, image_folder):
        one = _write(folder_source(str(image_folder)), tmp_path / "one")
        two = _write(folder_source(str(image_folder), workers=2), tmp_path / "two")
        assert one.fingerprint == two.fingerprint

    def test_an_unreadable_image_is_named(self, tmp_path, image_folder):
        broken = image_folder / "cat" / "broken.png"
        broken.write_bytes((image_folder / "cat" / "grey.png").read_bytes()[:200])
        with pytest.raises(UserError, match=r"broken\.png: not a readable image"):
            _write(folder_source(str(image_folder)), tmp_path / "out")
        with pytest.raises(UserError, match=r"out/index\.json: no such file"):
            open_index(str(tmp_path / "out"))
        broken.unlink()
        assert len(_write(folder_source(str(image_folder)), tmp_path / "out")) == 6
        assert verify(str(tmp_path / "out")) == []

    def test_a_folder_without_images(self, tmp_path, image_folder):
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="empty: no images: there must be a sub-folder"):
            open_image_source(str(tmp_path / "empty"))
        (image_folder / "fox").mkdir()
        with pytest.raises(UserError, match="the folder of class fox has no images"):
            open_image_source(str(image_folder))

    def test_images_outside_of_the_class_folders(self, image_folder):
        (image_folder / "stray.png").write_bytes(_png(3))
        with pytest.raises(UserError, match=r"stray\.png, …\) are outside of the class folders"):
            open_image_source(str(image_folder))


class TestArrays:
    def test_npz_and_npy_files(self, tmp_path, caplog):
        caplog.set_level("INFO")
        images, labels = np.zeros((3, 4, 4), np.uint8), np.array([0, 2, 1])
        np.savez(tmp_path / "both.npz", images=images, labels=labels, masks=labels)
        np.save(tmp_path / "x.npy", images)
        np.save(tmp_path / "y.npy", labels)
        sources = [
            open_image_source(str(tmp_path / "both.npz"), shuffle=False),
            open_image_source(
                str(tmp_path / "x.npy"), labels=str(tmp_path / "y.npy"), shuffle=False
            ),
        ]
        for source in sources:
            assert source.classes == ("0", "1", "2")
            assert [sample.label for sample in source] == [0, 2, 1]
        assert caplog.messages == [f"{tmp_path}/both.npz: left out 1 arrays (masks)"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"images": np.zeros((3, 4, 4), np.uint8)}, "arrays 'images' and 'labels'"),
            ({"images": np.zeros((3, 4, 4)), "labels": np.zeros(3, int)}, "must be uint8"),
            ({"images": np.zeros((3, 4), np.uint8), "labels": np.zeros(3, int)}, r"\(3, 4\)"),
            ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(2, int)}, "labels are"),
            ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(3)}, "labels are float"),
            ({"images": np.zeros((1, 4, 4), np.uint8), "labels": np.array([-1])}, "from -1 to -1"),
        ],
    )
    def test_unusable_arrays(self, tmp_path, content, message):
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(UserError, match=message):
            open_image_source(str(tmp_path / "a.npz"))

    def test_files_that_are_not_arrays(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut off")
        (tmp_path / "b.npy").write_bytes(b"")
        np.save(tmp_path / "c.npy", np.zeros((3, 4, 4), np.uint8))
        for name, labels in (("a.npz", None), ("b.npy", str(tmp_path / "c.npy"))):
            with pytest.raises(UserError, match=rf"{name}: cannot be read as arrays"):
                open_image_source(str(tmp_path / name), labels=labels)
        (tmp_path / "d.npy").write_bytes((tmp_path / "c.npy").read_bytes() * 2)
        (tmp_path / "e.png").write_bytes(_png(0))
        for labels, message in (
            ("b.npy", r"b\.npy: cannot be read as arrays"),
            ("d.npy", r"d\.npy: there is data after the array"),
            ("e.png", r"e\.png: cannot be read as arrays \(the magic string"),
        ):
            with pytest.raises(UserError, match=message):
                open_image_source(str(tmp_path / "c.npy"), labels=str(tmp_path / labels))
        with pytest.raises(UserError, match=r"e\.png: cannot be read as arrays: give a folder"):
            open_image_source(str(tmp_path / "e.png"))
        with pytest.raises(UserError, match=r"c\.npy: give the labels of the images as --labels"):
            open_image_source(str(tmp_path / "c.npy"))
        with pytest.raises(UserError, match=r"--labels is for an \.npy file of images"):
            open_image_source(str(tmp_path / "a.npz"), labels=str(tmp_path / "c.npy"))
        with pytest.raises(UserError, match="--image-column and --label-column are for"):
            open_image_source(str(tmp_path / "a.npz"), image_column="image")
        with pytest.raises(UserError, match="nowhere: no such file or folder"):
            open_image_source(str(tmp_path / "nowhere"))


class TestOutFolder:
    def test_finished_shards_are_never_overwritten(self, make_shards):
        make_shards(10)
        with pytest.raises(UserError, match="has finished shards already"):
            make_shards(10)

    def test_a_folder_with_other_files_is_an_error_and_not_changed(self, tmp_path):
        other = tmp_path / "out" / "shard-000000.tar"
        other.parent.mkdir()
        other.write_bytes(b"another file")
        with pytest.raises(UserError, match=r"not empty \(it contains shard-000000\.tar\)"):
            write_shards([ShardSample(_png(0), "png", 0)], str(other.parent))
        assert other.read_bytes() == b"another file"

    def test_an_interrupted_write_starts_again(self, tmp_path):
        def interrupted():
            yield from [ShardSample(_png(i), "png", 0) for i in range(25)]
            raise KeyboardInterrupt

        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            write_shards(interrupted(), str(out), samples_per_shard=10)
        assert (out / "shard-000001.tar").exists()
        write_shards([ShardSample(_png(0), "png", 0)], str(out))
        names = sorted(path.name for path in out.iterdir())
        assert names == ["index.json", "samples.npy", "shard-000000.tar"]
        assert verify(str(out)) == []

    def test_no_samples(self, tmp_path):
        with pytest.raises(UserError, match="no sample to write"):
            write_shards([], str(tmp_path / "out"))

    @pytest.mark.parametrize("label", [-1, 3])
    def test_a_label_without_a_class(self, tmp_path, label):
        with pytest.raises(UserError, match=f"sample 0 has label {label}, out of range"):
            write_shards(
                [ShardSample(_png(0), "png", label)], str(tmp_path / "out"), classes=("a", "b", "c")
            )
