"""Rows with no image, one or several: slots, the arrangement of sources, dropped rows."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from tiny_captions import TALKS, TOKENIZER, make_captioned_shards, make_talks, talk

from rae_xla.data.bad_samples import BadSampleLog, SampleError
from rae_xla.data.captions import CaptionRows, RowFormat, check_length
from rae_xla.data.conversations import IMAGE_TOKEN
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import CaptionedMixture, open_training_data
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mixed")
    return [
        make_captioned_shards(folder / "captions", count=24),
        make_talks(folder, "texts", [talk(f"count to {i}", "one two") for i in range(12)]),
        make_talks(folder, "several", TALKS * 4),
    ]


def open_rows(
    folders: list[str], weights: list[float], **options: Any
) -> tuple[CaptionedMixture, CaptionRows]:
    data = open_training_data(folders, weights)
    assert isinstance(data, CaptionedMixture)
    return data, CaptionRows(data.text_tables(), TOKENIZER, 16, 96, seed=3, **options)


def loader(data: CaptionedMixture, rows: CaptionRows, **options: Any) -> TrainingLoader:
    return TrainingLoader(
        data, seed=3, global_batch_size=8, transform=CenterCrop(56), row_arrays=rows, **options
    )


def take(loader: TrainingLoader, start: int, count: int) -> list[dict[str, Any]]:
    batches = loader.batches(start)
    taken = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def test_rows_have_a_slot_for_every_image(folders: list[str]) -> None:
    data, rows = open_rows(folders[2:], [1.0], images_per_row=2, answers_per_row=2)
    assert len(data) == 16
    [batch] = take(loader(data, rows), 0, 1)
    assert batch["image"].shape == (8, 2, 3, 56, 56)
    colours = {"red": 0, "green": 1, "blue": 2}
    expected = [["red", "green"], ["blue", "red"], [], ["green"]]
    for sample, ids, images in zip(batch["index"], batch["ids"], batch["image"], strict=True):
        names = expected[int(sample) % 4]
        assert int((ids == IMAGE_TOKEN).sum()) == 16 * len(names)
        for slot, image in enumerate(images):
            if slot < len(names):
                assert int(image.float().mean((1, 2)).argmax()) == colours[names[slot]]
            else:
                assert not image.any()


def test_rows_with_too_many_images_are_dropped_with_their_reason(folders: list[str]) -> None:
    _, rows = open_rows(folders[2:], [1.0])
    with pytest.raises(SampleError, match=r"2 images, more than text_to_image.images_per_row = 1"):
        rows.arrays(0, 0, 0, 0)
    _, rows = open_rows(folders[2:], [1.0], images_per_row=2, format=RowFormat(row_pattern=(2, 1)))
    with pytest.raises(SampleError, match=r"generates 2 images, more than .*answers_per_row = 1"):
        rows.arrays(0, 1, 0, 0)
    assert rows.arrays(0, 1, 0, 1)["ids"].shape == (96,)  # the head does not run for this row
    with pytest.raises(UserError, match="2 images alone take 32 tokens: write at least 48"):
        check_length(40, 16, 2)


def test_sources_without_answers_get_the_rows_without_head(folders: list[str]) -> None:
    form = RowFormat(row_pattern=(4, 3), micro_batches=2)
    data, rows = open_rows(folders[:2], [3.0, 1.0], format=form)
    _, texts = rows.arrange([6, 2])
    assert texts.tolist() == [6, 7]
    assert not any(form.generates(row) for row in texts)
    # more texts than such rows: the others get the rows that are left
    assert sorted(np.concatenate(rows.arrange([4, 4])).tolist()) == list(range(8))
    [batch] = take(loader(data, rows), 0, 1)
    assert batch["source"].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert (batch["ids"] == IMAGE_TOKEN).any(1).tolist() == [True] * 6 + [False] * 2
    assert not batch["image"][6:].any()


def test_all_rows_may_be_text(folders: list[str]) -> None:
    data, rows = open_rows(folders[1:2], [1.0])
    [batch] = take(loader(data, rows), 0, 1)
    assert batch["image"].shape == (8, 3, 56, 56)
    assert not batch["image"].any()


def test_a_run_goes_on_with_the_same_rows_on_other_hosts(folders: list[str]) -> None:
    """The mixture's next sample after a change of host count, with replaced samples."""
    data, rows = open_rows(
        folders,
        [2.0, 1.0, 1.0],
        images_per_row=2,
        format=RowFormat(prompts=("draw {caption}", "{caption}"), row_pattern=(2, 1)),
    )
    log = BadSampleLog(max_fraction=10.0)
    expected = take(loader(data, rows, bad_samples=log), 0, 10)
    assert log.count > 0  # rows that generate two images
    for hosts in (2, 4):
        parts = [
            take(
                loader(
                    data, rows, process_index=host, process_count=hosts,
                    bad_samples=BadSampleLog(max_fraction=10.0),
                ), 7, 3,
            )
            for host in range(hosts)
        ]  # fmt: skip
        for step, whole in enumerate(expected[7:]):
            for name, values in whole.items():
                joined = np.concatenate([part[step][name] for part in parts])
                assert np.array_equal(joined, values), (hosts, step, name)
