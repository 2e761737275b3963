"""Resuming a large data set at step 1,000,000 costs the same as at step 10."""

import time
from dataclasses import replace

import numpy as np
import pytest
from photographs import write_photographs

from rae_xla.data.loader import TrainingLoader
from rae_xla.data.sampler import block_size
from rae_xla.data.shards.index import open_index
from rae_xla.data.transforms import CenterCrop

pytestmark = pytest.mark.slow

SAMPLES, BATCH = 2_000_000, 256


def large(index):
    """Return an index of two million samples, which repeats the same few shards."""
    copies = -(-SAMPLES // len(index))
    return replace(index, shards=index.shards * copies, samples=np.tile(index.samples, copies))


@pytest.fixture(params=["disk", "bucket"])
def index(request, tmp_path):
    folder = (
        str(tmp_path / "shards") if request.param == "disk" else request.getfixturevalue("bucket")
    )
    write_photographs(folder, count=1000, size=(48, 36), samples_per_shard=500)
    return large(open_index(folder))


def first_batches(index, step):
    """Return the seconds until the first batch; also load two more."""
    loader = TrainingLoader(index, seed=1, global_batch_size=BATCH, transform=CenterCrop(32))
    start = time.perf_counter()
    batches = loader.batches(step)
    next(batches)
    seconds = time.perf_counter() - start
    next(batches), next(batches)
    batches.close()
    return seconds


def test_the_first_batch_costs_the_same_at_any_step(index, request, record_property):
    assert block_size(len(index), index.num_bytes) > 100  # long reads, as for a real large data set
    emulator = request.getfixturevalue("gcs") if index.folder.startswith("gs://") else None
    first_batches(index, 0)  # imports, connections
    seconds, requests = {}, {}
    for step in (10, 1_000_000):
        times = []
        for repeat in range(3):
            before = emulator.stats()["media_gets"] if emulator else 0
            times.append(first_batches(index, step + repeat))
            requests[step] = emulator.stats()["media_gets"] - before if emulator else 0
        seconds[step] = min(times)
    record_property("seconds", seconds)
    record_property("requests", requests)
    print(seconds, requests)
    # Skipping a million batches would take hours; a busy machine adds less than half a second.
    assert seconds[1_000_000] < 2 * seconds[10] + 0.5
    assert requests[1_000_000] <= 2 * requests[10]
    assert requests[10] <= 2 * requests[1_000_000]
