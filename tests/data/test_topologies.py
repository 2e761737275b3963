"""The same global batches, pixels and flips for any number of hosts and workers, and any storage.

The images are JPEGs with random crops; the bucket is a server on the loopback interface.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch
from photographs import write_photographs

from rae_xla.data.loader import TrainingLoader
from rae_xla.data.shards.index import open_index
from rae_xla.data.transforms import ResizeRandomCrop

pytestmark = pytest.mark.slow

BATCH, STEPS = 32, 7  # past the end of the first epoch

FEW = {"disk": [(1, 1), (2, 4), (8, 1)], "bucket": [(1, 1), (2, 4)]}
MANY = [(hosts, workers) for hosts in (1, 2, 4, 8) for workers in (1, 2, 4)]
CASES = [
    pytest.param(storage, *pair, marks=[] if pair in FEW[storage] else pytest.mark.nightly)
    for storage in ("disk", "bucket")
    for pair in MANY
]


def take(index, hosts, workers, start=0, steps=STEPS):
    """Return the global batches, from hosts that run at the same time."""

    def one_host(number):
        loader = TrainingLoader(
            index, seed=3, global_batch_size=BATCH, transform=ResizeRandomCrop(32, fast=True),
            process_index=number, process_count=hosts, num_workers=workers, flip=True,
        )  # fmt: skip
        batches = loader.batches(start)
        taken = list(islice(batches, steps))
        batches.close()
        return taken

    with ThreadPoolExecutor(hosts) as pool:
        parts = list(pool.map(one_host, range(hosts)))
    return [
        {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index"}
        for name in one:
            assert torch.equal(one[name], other[name])


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data") / "shards")
    return write_photographs(folder, count=150, size=(80, 60), shard_size_bytes=60_000)


@pytest.fixture(scope="module")
def expected(on_disk):
    """Batches from disk, of one host, built in a thread."""
    batches = take(on_disk, hosts=1, workers=0, steps=12)
    assert sorted(torch.cat([b["index"] for b in batches[:4]]).tolist()) != list(range(128))
    assert batches[0]["image"].shape == (BATCH, 3, 32, 32)
    return batches


@pytest.fixture(scope="module")
def in_bucket(on_disk, gcs):
    folder = "gs://shards/topologies"
    written = write_photographs(folder, count=150, size=(80, 60), shard_size_bytes=60_000)
    assert written.fingerprint == on_disk.fingerprint
    assert written.generations.keys() == {shard.file for shard in written.shards}
    return open_index(folder)


@pytest.fixture
def index(request, on_disk):
    return on_disk if request.param == "disk" else request.getfixturevalue("in_bucket")


@pytest.mark.parametrize(("index", "hosts", "workers"), CASES, indirect=["index"])
def test_the_same_global_batches(index, expected, hosts, workers):
    assert_same(take(index, hosts, workers), expected[:STEPS])


@pytest.mark.parametrize("index", ["disk", "bucket"], indirect=True)
@pytest.mark.parametrize(("start", "hosts"), [(1, 2), (3, 8), (4, 1), (5, 4), (9, 2)])
def test_resumed_on_another_number_of_hosts(index, expected, start, hosts):
    """As for a run that was stopped after ``start`` steps, anywhere in an epoch."""
    assert_same(take(index, hosts, workers=0, start=start, steps=3), expected[start : start + 3])


def test_flips_and_crops_are_random(expected):
    """A precondition of the other tests: a sample differs from epoch to epoch."""
    seen = {}
    for batch in expected:
        for sample, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            seen.setdefault(sample, []).append(image)
    pairs = [images for images in seen.values() if len(images) > 1]
    assert len(pairs) > 50
    assert np.mean([torch.equal(images[0], images[1]) for images in pairs]) < 0.05
