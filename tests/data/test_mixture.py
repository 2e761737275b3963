"""Mixtures of several sources: shares, numbering, topologies and errors."""

import os
from itertools import islice

import numpy as np
import pytest
import torch

from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import Mixture, open_training_data
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import ResizeRandomCrop
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def mixture(make_shards):
    return Mixture((make_shards(100, "one"), make_shards(60, "two")), (0.7, 0.3))


def take(data, start, steps, **options):
    loader = TrainingLoader(
        data, seed=5, global_batch_size=16, transform=ResizeRandomCrop(8), flip=True, **options
    )
    batches = loader.batches(start)
    taken = list(islice(batches, steps))
    batches.close()
    return taken


@pytest.mark.parametrize(
    ("weights", "batch", "rows"),
    [
        ((0.7, 0.3), 16, [11, 5]),
        ((0.7, 0.3), 1024, [717, 307]),
        ((1, 1), 16, [8, 8]),
        ((2, 1), 9, [6, 3]),
        ((1, 1), 9, [5, 4]),
    ],
)
def test_rows_per_source(mixture, weights, batch, rows):
    assert Mixture(mixture.sources, weights).rows_per_source(batch) == rows


def test_every_row_has_a_sample_of_its_source(mixture):
    first, second = [], []
    for batch in take(mixture, 0, 24):
        ids = batch["index"]
        assert (ids[:11] < 100).all()
        assert (ids[11:] >= 100).all()
        number = torch.where(ids < 100, ids, ids - 100)
        assert torch.equal(batch["label"], number % 5)
        first += ids[:11].tolist()
        second += (ids[11:] - 100).tolist()
    # each source has its own epochs, in which no sample is repeated
    assert len(set(first[:99])) == 99
    assert len(set(second[:60])) == 60
    assert len(set(second[60:120])) == 60
    assert second[:60] != second[60:120]


@pytest.mark.parametrize(("hosts", "workers"), [(2, 0), (4, 0), (8, 0), (2, 2)])
def test_hosts_and_workers_divide_the_same_batches_and_resume(mixture, hosts, workers):
    expected = take(mixture, 0, 12)
    parts = [
        take(mixture, 5, 7, process_index=i, process_count=hosts, num_workers=workers)
        for i in range(hosts)
    ]
    for step, batch in enumerate(expected[5:]):
        for name in batch:
            assert torch.equal(torch.cat([part[step][name] for part in parts]), batch[name])


def test_the_same_number_in_two_sources_is_cropped_and_flipped_differently(make_shards):
    twice = Mixture((make_shards(64, "one"), make_shards(64, "two")), (1, 1))
    crops = [{}, {}]
    for batch in take(twice, 0, 8):
        for sample, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            crops[sample // 64][sample % 64] = image
    same = [torch.equal(crops[0][i], crops[1][i]) for i in crops[0].keys() & crops[1].keys()]
    assert len(same) > 50
    assert np.mean(same) < 0.2


def test_an_epoch_has_as_many_samples_as_all_sources(mixture):
    assert len(mixture) == 160
    loader = TrainingLoader(mixture, seed=0, global_batch_size=16, transform=ResizeRandomCrop(8))
    assert loader.steps_per_epoch == 10


def test_fingerprints(mixture, make_shards):
    one = Mixture(mixture.sources[:1], (3.0,))
    assert one.fingerprint == mixture.sources[0].fingerprint
    assert mixture.fingerprint == Mixture(mixture.sources, (7, 3)).fingerprint
    assert mixture.fingerprint != Mixture(mixture.sources, (1, 1)).fingerprint
    assert mixture.fingerprint != Mixture(mixture.sources[::-1], (0.7, 0.3)).fingerprint


def test_opening_the_folders_of_a_configuration(mixture):
    folders = [source.folder for source in mixture.sources]
    assert open_training_data(folders[0]).fingerprint == mixture.sources[0].fingerprint
    assert open_training_data(folders, (7, 3)).fingerprint == mixture.fingerprint


def test_bad_input(mixture, tmp_path):
    folders = [source.folder for source in mixture.sources]
    with pytest.raises(UserError, match=rf"data\.weights: the weight of {folders[1]} is 0"):
        open_training_data(folders, (1, 0))
    with pytest.raises(UserError, match="names no shards"):
        open_training_data([])
    with pytest.raises(UserError, match=r"3 numbers, data\.train has 2 folders"):
        open_training_data(folders, (1, 1, 1))
    with pytest.raises(UserError, match=f"names {folders[0]} twice"):
        open_training_data([folders[0], os.path.join(folders[0], "index.json")])
    with pytest.raises(UserError, match=f"{folders[1]} gives it no row in a batch of 16"):
        Mixture(mixture.sources, (1000, 1)).rows_per_source(16)
    with pytest.raises(UserError, match=f"{folders[1]}: 60 samples, fewer than its 80 rows of 160"):
        Mixture(mixture.sources, (1, 1)).source_rows(160, 0, True)
    with pytest.raises(UserError, match="no such folder"):
        open_training_data([folders[0], os.path.join(folders[0], "nowhere")])
    with pytest.raises(UserError, match="label 4"):
        mixture.check_labels(4)
    images = np.zeros((9, 8, 8), np.uint8)
    source = array_source(images, np.arange(9) % 3, classes=("x", "y", "z"))
    other = write_shards(source, str(tmp_path / "other"), classes=("x", "y", "z"))
    with pytest.raises(UserError, match=r"the classes of .*one and .*other differ"):
        Mixture((mixture.sources[0], other), (1, 1)).check_labels(5)
