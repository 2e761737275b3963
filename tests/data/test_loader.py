"""Batches of the training loader and of a single pass: content, topologies, resuming."""

import multiprocessing
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from rae_xla.data.loader import TrainingLoader, one_pass
from rae_xla.data.shards.index import open_index
from rae_xla.data.transforms import CenterCrop, ResizeRandomCrop
from rae_xla.errors import UserError

pytestmark = pytest.mark.slow


def _loader(index, **options):
    settings = {"seed": 5, "global_batch_size": 16, "transform": CenterCrop(8)} | options
    return TrainingLoader(index, **settings)


def _take(batches, count):
    taken = list(islice(batches, count))
    batches.close()
    return taken


def _assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def _concatenated(parts):
    """Return the global batches from those of every process."""
    return [
        {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_shapes_dtypes_and_content_of_a_batch(make_shards):
    index = make_shards(100)
    batch = next(_loader(index).batches())
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.uint8, (16, 3, 8, 8))
    assert batch["image"].is_contiguous()
    assert (batch["label"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
    number = batch["image"][:, 0, 0, 0].long() + 256 * batch["image"][:, 0, 0, 1].long()
    assert torch.equal(number, batch["index"])
    assert torch.equal(batch["label"], batch["index"] % 5)


# A random crop, and flips: both must depend on the sample and not on the machine.
CROPS = {"transform": ResizeRandomCrop(8), "flip": True}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_divide_the_same_global_batches(make_shards, hosts):
    index = make_shards(100)
    expected = _take(_loader(index, **CROPS).batches(), 15)
    parts = [
        _take(_loader(index, process_index=i, process_count=hosts, **CROPS).batches(), 15)
        for i in range(hosts)
    ]
    assert len(parts[0][0]["index"]) == 16 // hosts
    _assert_same(_concatenated(parts), expected)


def test_worker_processes_build_the_same_batches_and_end_with_the_iterator(make_shards):
    index = make_shards(100)
    expected = _take(_loader(index, **CROPS).batches(start_step=4), 9)
    batches = _loader(index, num_workers=2, **CROPS).batches(start_step=4)
    taken = list(islice(batches, 9))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    _assert_same(taken, expected)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("start", [1, 5, 6, 7, 14])
def test_a_resumed_loader_continues_with_the_very_next_batch(make_shards, start):
    index = make_shards(100)
    expected = _take(_loader(index, **CROPS).batches(), 20)
    _assert_same(_take(_loader(index, **CROPS).batches(start), 20 - start), expected[start:])


def test_resuming_costs_the_same_at_any_step(make_shards):
    index = make_shards(100)

    def seconds(step: int) -> float:
        batches = _loader(index).batches(step)
        start = time.process_time()
        next(batches)
        batches.close()
        return time.process_time() - start

    seconds(0)
    early, late = min(seconds(i) for i in range(5)), min(seconds(10**7 + i) for i in range(5))
    assert late < 2 * early + 0.05


def test_an_epoch_has_every_sample_once_and_every_epoch_another_order(make_shards):
    index = make_shards(96)
    loader = _loader(index, flip=True)
    assert loader.steps_per_epoch == 6
    batches = _take(loader.batches(), 12)
    ids = torch.cat([batch["index"] for batch in batches])
    assert sorted(ids[:96].tolist()) == sorted(ids[96:].tolist()) == list(range(96))
    assert not torch.equal(ids[:96], ids[96:])


def test_half_of_the_samples_are_flipped_and_different_ones_in_every_epoch(make_shards):
    index = make_shards(96)
    plain, flipped = (_take(_loader(index, flip=flip).batches(), 12) for flip in (False, True))
    is_flipped = {}
    for step, (one, other) in enumerate(zip(plain, flipped, strict=True)):
        for row, sample in enumerate(one["index"].tolist()):
            mirrored = torch.equal(other["image"][row], one["image"][row].flip(-1))
            assert mirrored or torch.equal(other["image"][row], one["image"][row])
            is_flipped[step // 6, sample] = mirrored
    first, second = ([is_flipped[epoch, sample] for sample in range(96)] for epoch in (0, 1))
    assert 0.3 < np.mean(first) < 0.7
    assert 0.3 < np.mean(np.equal(first, second)) < 0.7


def test_without_shuffle_the_order_is_that_of_the_index(make_shards):
    batches = _take(_loader(make_shards(40), shuffle=False).batches(), 3)
    ids = torch.cat([batch["index"] for batch in batches]).tolist()
    assert ids == [*range(32), *range(16)]


def test_the_next_batches_are_built_while_the_caller_computes(make_shards):
    threads: list[int] = []

    def slow(image, u):
        threads.append(threading.get_ident())
        return CenterCrop(8)(image, u)

    batches = _loader(make_shards(100), transform=slow, prefetch=2).batches()
    next(batches)
    deadline = time.monotonic() + 10
    while len(threads) < 48 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(threads) == 48  # the batch in use and two more
    assert threading.get_ident() not in threads
    batches.close()


class TestOnePass:
    @pytest.mark.parametrize("hosts", [1, 2, 4])
    def test_every_sample_once_in_order_and_with_a_weight(self, make_shards, hosts):
        index = make_shards(70)
        options = {"batch_size": 16, "transform": CenterCrop(8), "process_count": hosts}
        batches = _concatenated(
            [list(one_pass(index, process_index=i, **options)) for i in range(hosts)]
        )
        assert [len(batch["index"]) for batch in batches] == [16] * 5
        ids, weight = (torch.cat([b[name] for b in batches]) for name in ("index", "weight"))
        assert ids[weight == 1].tolist() == list(range(70))
        assert ids[weight == 0].tolist() == [69] * 10
        assert weight.dtype == torch.float32

    def test_crops_are_centred(self, make_shards):
        index = make_shards(20)
        batch = next(one_pass(index, batch_size=4, transform=ResizeRandomCrop(8)))
        centred = TrainingLoader(
            index,
            seed=0,
            global_batch_size=4,
            transform=lambda image, u: ResizeRandomCrop(8)(image, (0.5, 0.5)),
            shuffle=False,
        )
        assert torch.equal(batch["image"], next(centred.batches())["image"])

    def test_a_worker_process_gives_the_same_pass(self, make_shards):
        index = make_shards(70)
        options = {"batch_size": 16, "transform": CenterCrop(8)}
        plain = list(one_pass(index, **options))
        _assert_same(list(one_pass(index, num_workers=1, **options)), plain)


class TestBadInput:
    def test_batches_that_cannot_be_divided(self, make_shards):
        index = make_shards(100)
        with pytest.raises(UserError, match="16 cannot be divided among 3 processes"):
            _loader(index, process_count=3)
        with pytest.raises(UserError, match="cannot be divided"):
            one_pass(index, batch_size=5, transform=CenterCrop(8), process_count=2)
        with pytest.raises(UserError, match="100 samples, fewer than one global batch of 128"):
            _loader(index, global_batch_size=128)

    def test_a_shard_overwritten_during_the_run_is_named(self, make_shards):
        index = make_shards(100)
        with open(index.path_of(index.shards[3]), "r+b") as file:
            file.seek(int(index.samples["offset"][95]) + 60)
            file.write(b"\0\1\2\3")
        with pytest.raises(UserError, match=r"shard-000003\.tar: sample 95 was changed"):
            list(one_pass(index, batch_size=10, transform=CenterCrop(8)))

    def test_labels_out_of_range_for_a_model(self, make_shards):
        index = make_shards(100)
        assert open_index(index.folder, num_classes=5).max_label == 4
        with pytest.raises(UserError, match=r"label 4 \(sample 4, in shard-000000\.tar\) is out"):
            open_index(index.folder, num_classes=4)
