"""Making, indexing and verifying shards in ``gs://``."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from foreign_tars import jpeg, write_imagenet
from numbered import numbered_arrays

from rae_xla import storage
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.sources import array_source, open_image_source
from rae_xla.data.shards.stats import save_stats_plot, shard_stats
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import make_shards
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def tars(tmp_path, bucket) -> str:
    """Write three foreign tars to the bucket; return the pattern that names them."""
    pattern = write_imagenet(tmp_path / "tars")
    for path in (tmp_path / "tars").glob("*.tar"):
        storage.write_bytes(f"{bucket}/tars/{path.name}", path.read_bytes())
    return pattern.replace(str(tmp_path), bucket)


def _contents(folder: str) -> dict[str, bytes]:
    return {
        name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)
    }


def _generations(folder: str) -> dict[str, str | None]:
    return {
        name: info.generation
        for name, info in storage.list_files(folder).items()
        if name.endswith(".tar")
    }


def test_interrupted_in_a_bucket(tmp_path, bucket):
    source = array_source(*numbered_arrays(45), workers=2)
    make_shards(source, str(tmp_path / "local"), samples_per_shard=10)

    def interrupted(samples, done):
        yield from (next(samples) for _ in range(25))
        raise KeyboardInterrupt

    out = f"{bucket}/out"
    with pytest.raises(KeyboardInterrupt):
        make_shards(source, out, samples_per_shard=10, progress=interrupted)
    before = _generations(out)
    assert list(before) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(UserError, match=r"settings: --samples-per-shard \(10 then, 11 now\)"):
        make_shards(source, out, samples_per_shard=11)
    make_shards(source, out, samples_per_shard=10)
    assert _contents(out) == _contents(str(tmp_path / "local"))
    assert _generations(out).items() >= before.items()
    assert verify(out, workers=2) == []


def test_tars_in_a_bucket_as_a_source(tmp_path, bucket, tars):
    for source in (tars, f"{bucket}/tars"):
        for workers in (1, 2):
            samples = list(open_image_source(source, shuffle=False, workers=workers))
            assert [sample.image for sample in samples] == [jpeg(n) for n in range(21)]
    with pytest.raises(UserError, match=r"tars/imagenet1k-train-0003\.tar: no such file"):
        open_image_source(tars.replace("0002}", "0003}"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_image_source(f"{bucket}/nowhere")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tar_that_is_overwritten_while_it_is_read(bucket, tars, workers):
    """With the same bytes, but not the object that was listed."""
    index_shards(f"{bucket}/tars")
    source = open_image_source(f"{bucket}/tars", shuffle=False, workers=workers)
    assert len(list(source)) == 21
    name = f"{bucket}/tars/imagenet1k-train-0001.tar"
    storage.write_bytes(name, storage.read_bytes(name))
    with pytest.raises(UserError, match=r"0001\.tar: the tar has disappeared or was overwritten"):
        list(source)
    assert len(list(open_image_source(f"{bucket}/tars", workers=workers))) == 21


def test_an_index_over_tars_in_a_bucket(tmp_path, bucket, tars):
    index = index_shards(tars, f"{bucket}/index", workers=2)
    assert index.folder == f"{bucket}/tars"
    assert verify(f"{bucket}/index") == []
    local = index_shards(tars, str(tmp_path / "index"))
    assert local.fingerprint == index.fingerprint
    assert verify(str(tmp_path / "index"), workers=2) == []
    stats = shard_stats(open_index(str(tmp_path / "index")))
    assert stats.widths.tolist() == [24] * 21
    save_stats_plot(stats, f"{bucket}/stats.png")
    assert storage.read_bytes(f"{bucket}/stats.png").startswith(b"\x89PNG")
    own = index_shards(f"{bucket}/tars")
    assert own.fingerprint == index.fingerprint
    name = f"{bucket}/tars/imagenet1k-train-0001.tar"
    storage.write_bytes(name, storage.read_bytes(name)[:3000])
    text = "\n".join(map(str, verify(f"{bucket}/tars")))
    assert "imagenet1k-train-0001.tar: truncated: 3000 bytes" in text
    storage.remove(f"{bucket}/tars/index.json")
    storage.remove(f"{bucket}/tars/samples.npy")
    with pytest.raises(UserError, match=r"1 of 3 tars cannot be indexed.*train-0001\.tar: not a"):
        index_shards(f"{bucket}/tars")


def test_the_command_killed_while_it_writes_to_a_bucket(tmp_path, gcs, bucket, image_folder):
    for number in range(90):
        Path(image_folder / "dog" / f"{number}.jpg").write_bytes(jpeg(number, 400, 300))
    command = [sys.executable, "-m", "rae_xla", "shards", "make", str(image_folder)]
    options = ["--image-size", "100", "--samples-per-shard", "8", "--workers", "2"]
    subprocess.run([*command, str(tmp_path / "local"), *options], check=True, capture_output=True)
    out = f"{bucket}/out"
    process = subprocess.Popen([*command, out, *options], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(_generations(out)) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = _generations(out)
    assert 3 <= len(before) < 12
    again = subprocess.run([*command, out, *options], check=True, capture_output=True, text=True)
    assert f"{out}: resuming after" in again.stderr
    assert _contents(out) == _contents(str(tmp_path / "local"))
    # The last may have been uploaded but not recorded.
    kept = dict(list(before.items())[:-1])
    assert _generations(out).items() >= kept.items()
    assert ".writing" not in storage.list_files(out)
