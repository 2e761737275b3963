"""Bad samples are replaced, counted, logged and recorded; too many of them end the run."""

import dataclasses
import io
import json
import os
import resource
from itertools import count, islice

import numpy as np
import pytest
import torch
from numbered import numbered_arrays
from PIL import Image

from rae_xla.data.bad_samples import BadSample, BadSampleLog, replacement
from rae_xla.data.loader import TrainingLoader, one_pass
from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError

BATCH, STEPS = 16, 12


def make_loader(index, file=None, limit=1.0, workers=0, first_step=0, **options):
    bad = BadSampleLog(file, start=first_step, max_fraction=limit)
    loader = TrainingLoader(
        index, seed=5, global_batch_size=BATCH, transform=CenterCrop(8), num_workers=workers,
        bad_samples=bad, **options,
    )  # fmt: skip
    return loader, bad


def take(loader, start=0, steps=STEPS):
    batches = loader.batches(start)
    taken = list(islice(batches, steps))
    batches.close()
    return taken


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def corrupt(index, sample):
    """Overwrite bytes of the image of a sample."""
    with open(index.path_of(index.shard_of(sample)), "r+b") as file:
        file.seek(int(index.samples["offset"][sample]) + 20)
        file.write(b"\0\1\2\3")


def truncate(index, sample):
    """Truncate the sample's shard right before it, between two members of the tar."""
    header = int(index.samples["offset"][sample]) - 512
    os.truncate(index.path_of(index.shard_of(sample)), header)


def remove(index, sample):
    os.remove(index.path_of(index.shard_of(sample)))


@pytest.fixture
def index(make_shards):
    return make_shards(100)  # shards of 30, 30, 30 and 10


FAULTS = {
    "overwritten": (corrupt, 95, {95}, "sample 95 was changed after the index was written"),
    "truncated at a member": (
        truncate,
        95,
        set(range(95, 100)),
        "the shard is truncated: it ends before",
    ),
    "gone": (remove, 95, set(range(90, 100)), "the shard has disappeared"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_replaced_counted_logged_and_recorded(
    index, tmp_path, caplog, fault, workers
):
    clean = take(make_loader(index)[0])
    damage, sample, lost, reason = FAULTS[fault]
    damage(index, sample)
    file = tmp_path / "bad_samples.jsonl"
    loader, bad = make_loader(index, file, workers=workers)
    batches = take(loader)

    listed = [json.loads(line) for line in file.read_text().splitlines()]
    replaced = {(x["step"], x["epoch"], x["sample"]): x["replaced_by"] for x in listed}
    seen = 0
    for step, (before, after) in enumerate(zip(clean, batches, strict=True)):
        assert after["image"].shape == before["image"].shape
        for row, old in enumerate(before["index"].tolist()):
            new, epoch = int(after["index"][row]), step // loader.steps_per_epoch
            if old not in lost:
                assert new == old
                assert torch.equal(after["image"][row], before["image"][row])
                continue
            seen += 1
            assert new not in lost
            candidates = (replacement(5, epoch, old, attempt, 100) for attempt in count())
            assert new == next(sample for sample in candidates if sample not in lost)
            assert replaced[step, epoch, old] == new
            assert after["label"][row] == new % 5
            # the image is really that of the replacement
            number = after["image"][row, 0, 0, 0].long() + 256 * after["image"][row, 0, 0, 1].long()
            assert number == new
    assert seen
    assert bad.count >= seen
    logged = [record.getMessage() for record in caplog.records]
    # batches built ahead of the last one taken are not counted yet
    assert len(listed) == len(logged) == bad.count
    shard = index.path_of(index.shard_of(sample))
    assert {line["shard"] for line in listed} == {shard}
    assert all(reason in line["reason"] or "truncated" in line["reason"] for line in listed)
    assert all(line.startswith(f"bad sample: {shard}: ") for line in logged)
    assert any(reason in line for line in logged)


def test_replacements_are_the_same_for_any_number_of_hosts(index):
    corrupt(index, 41)
    truncate(index, 72)
    expected = take(make_loader(index)[0])
    for hosts in (2, 4):
        parts = [
            take(make_loader(index, process_index=i, process_count=hosts)[0]) for i in range(hosts)
        ]
        for step, batch in enumerate(expected):
            for name in batch:
                assert torch.equal(torch.cat([part[step][name] for part in parts]), batch[name])
    resumed = take(make_loader(index)[0], start=7, steps=1)[0]
    assert torch.equal(resumed["image"], expected[7]["image"])


def test_an_image_that_does_not_decode(tmp_path, caplog):
    images, labels = numbered_arrays(40)
    samples = [ShardSample(png(p), "png", int(k)) for p, k in zip(images, labels, strict=True)]
    samples[7] = dataclasses.replace(samples[7], image=samples[7].image[:60])
    index = write_shards(samples, str(tmp_path / "shards"), classes=list("abcde"))
    loader, bad = make_loader(index)
    take(loader, steps=4)
    assert bad.count >= 1
    assert "the image of sample 7 does not decode" in caplog.text
    with pytest.raises(UserError, match=r"sample 7 does not decode .*make the shards again"):
        list(one_pass(index, batch_size=8, transform=CenterCrop(8)))


def test_too_many_bad_samples_end_the_run_with_the_list(index, tmp_path):
    remove(index, 0)
    file = tmp_path / "bad_samples.jsonl"
    loader, bad = make_loader(index, file, limit=0.001)
    with pytest.raises(UserError) as caught:
        take(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{bad.count} bad samples among 16 read, more than")
    assert "data.max_bad_samples = 0.001" in message
    assert "shard-000000.tar: sample" in message
    assert str(file) in message
    assert len(file.read_text().splitlines()) == bad.count


@pytest.mark.parametrize(
    ("read", "per_epoch", "allowed"), [(16, 10_000, 10), (16, 0, 0), (50_000, 10_000, 50)]
)
def test_the_limit_is_a_fraction_of_the_samples_read_and_at_least_of_an_epoch(
    read, per_epoch, allowed
):
    one = BadSample(0, 0, 3, "shard.tar", 512, "shard.tar: sample 3 is gone", 9)
    bad = BadSampleLog(max_fraction=0.001, per_epoch=per_epoch)
    bad.record(read, [one] * allowed)
    with pytest.raises(UserError, match=rf"^{allowed + 1} bad samples? among {read} read"):
        bad.record(0, [one])


def test_a_resumed_run_records_no_sample_twice(index, tmp_path):
    corrupt(index, 95)
    file = tmp_path / "bad_samples.jsonl"
    take(make_loader(index, file)[0])
    expected = file.read_text()
    steps = [json.loads(line)["step"] for line in expected.splitlines()]
    assert len(steps) > 1
    file.write_text(expected + '{"step": 1')  # killed while writing
    resumed, _ = make_loader(index, file, first_step=steps[-1])
    assert len(file.read_text().splitlines()) == steps.index(steps[-1])
    take(resumed, start=steps[-1], steps=STEPS - steps[-1])
    assert file.read_text() == expected


def test_a_fault_of_the_machine_is_an_error_and_no_bad_sample(index):
    """Here: too many open files."""
    loader, bad = make_loader(index)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match=r"shard-00000\d\.tar: .*Too many open files"):
            take(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert bad.count == 0


def test_the_run_ends_at_once_if_nothing_can_be_read(index):
    for shard in index.shards:
        os.remove(index.path_of(shard))
    with pytest.raises(UserError, match="9 samples in a row cannot be used, so nothing can be"):
        take(make_loader(index)[0])


def test_replacements_are_spread_and_depend_on_epoch_and_seed():
    replacements = [replacement(0, 0, sample, 0, 1000) for sample in range(1000)]
    assert len(set(replacements)) > 600
    assert replacement(0, 1, 5, 0, 1000) != replacement(0, 0, 5, 0, 1000)
    assert replacement(1, 0, 5, 0, 1000) != replacement(0, 0, 5, 0, 1000)
    assert replacement(0, 0, 5, 1, 1000) != replacement(0, 0, 5, 0, 1000)


def test_overwritten_shards_of_the_same_size_are_found_before_the_first_batch(index):
    corrupt(index, 29)
    corrupt(index, 99)
    with pytest.raises(UserError) as caught:
        open_index(index.folder)
    for shard in ("shard-000000.tar", "shard-000003.tar"):
        assert f"{shard} was overwritten" in str(caught.value)
    assert "shard-000001.tar" not in str(caught.value)


def test_a_truncated_shard_is_found_before_the_first_batch(index):
    os.truncate(index.path_of(index.shards[1]), 30_000)
    with pytest.raises(UserError, match=r"shard-000001\.tar is truncated: 30000 bytes"):
        open_index(index.folder)
