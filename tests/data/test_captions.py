"""Captions of training rows: choice, formats, dropped samples, mixtures, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_captions import TOKENIZER, make_captioned_shards

from rae_xla.data.bad_samples import BadSampleLog, SampleError
from rae_xla.data.captions import CaptionChoice, CaptionRows, RowFormat, check_length
from rae_xla.data.conversations import IGNORE, IMAGE_TOKEN
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import CaptionedMixture, open_training_data
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError


def open_rows(shards: str, **options: Any) -> tuple[CaptionedMixture, CaptionRows]:
    data = open_training_data(shards)
    assert isinstance(data, CaptionedMixture)
    return data, CaptionRows(data.text_tables(), TOKENIZER, 16, 96, seed=3, **options)


def text_of(rows: CaptionRows, ids: np.ndarray) -> str:
    return rows.rows.decode([i for i in ids.tolist() if i not in (IMAGE_TOKEN, rows.rows.pad)])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_captioned_shards(tmp_path_factory.mktemp("captions"), count=24)


def test_choice_prefers_the_first_source_or_follows_the_weights() -> None:
    texts = {"txt": "a", "json": {"caption": "b"}}
    assert CaptionChoice(("json.caption", "txt")).choose(texts, 0.9) == "b"
    weighted = CaptionChoice(("txt", "json.caption", "sidecar.x"), (3.0, 1.0, 4.0))
    chosen = [weighted.choose(texts, u) for u in (0.0, 0.74, 0.76, 0.999)]
    assert chosen == ["a", "a", "b", "b"]  # among those that the sample has
    assert CaptionChoice(("sidecar",)).choose(texts, 0.5) is None
    assert CaptionChoice(("txt",), max_chars=2).choose({"txt": "abcd"}, 0.5) == "ab"
    with pytest.raises(UserError, match="1 numbers for 2 sources"):
        CaptionChoice(("a", "b"), (1.0,))


def test_rows_generate_or_describe_by_their_number(shards: str) -> None:
    form = RowFormat(row_pattern=(4, 3), micro_batches=2)
    assert [form.generates(row) for row in range(8)] == [True] * 6 + [False] * 2
    _, rows = open_rows(shards, format=form)
    generating, describing = rows.arrays(0, 0, 0, 0), rows.arrays(0, 0, 0, 6)
    assert "a red square<|im_end|>\n<|im_start|>assistant\n<im_start><im_end>" in text_of(
        rows, generating["ids"]
    )
    assert "Describe the image.<|im_end|>\n<|im_start|>assistant\na red square" in text_of(
        rows, describing["ids"]
    )
    start = int(np.argmax(generating["ids"] == IMAGE_TOKEN))
    assert generating["labels"][start - 1] != IGNORE  # the image is an answer
    start = int(np.argmax(describing["ids"] == IMAGE_TOKEN))
    assert describing["labels"][start - 1] == IGNORE


def test_prompts_vary_with_epoch_and_sample_alone(shards: str) -> None:
    form = RowFormat(prompts=("x {caption}", "y {caption}"))
    _, rows = open_rows(shards, format=form)
    texts = [text_of(rows, rows.arrays(0, 5, epoch, 0)["ids"]) for epoch in range(12)]
    assert len(set(texts)) == 2
    again = [text_of(rows, rows.arrays(0, 5, epoch, 3)["ids"]) for epoch in range(12)]
    assert again == texts


def test_batches_hold_the_tokens_of_their_images(shards: str) -> None:
    data, rows = open_rows(shards)
    batches = {}
    for workers in (0, 2):
        loader = TrainingLoader(
            data,
            seed=3,
            global_batch_size=8,
            transform=CenterCrop(56),
            num_workers=workers,
            row_arrays=rows,
        )
        stream = loader.batches(2)
        batches[workers] = next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert all((batches[0][name] == batches[2][name]).all() for name in batches[0])
    batch = batches[0]
    assert batch["ids"].shape == batch["labels"].shape == (8, 96)
    for image, ids in zip(batch["image"], batch["ids"], strict=True):
        colour = ("red", "green", "blue")[int(image.float().mean((1, 2)).argmax())]
        assert f"a {colour} square" in text_of(rows, ids.numpy())


def test_samples_without_a_caption_are_replaced_and_counted(shards: str) -> None:
    data, rows = open_rows(shards, choice=CaptionChoice(("json.other",)))
    with pytest.raises(SampleError, match=r"sample 0 has no caption \(json\.other\)"):
        rows.arrays(0, 0, 0, 0)
    data, rows = open_rows(shards)
    _, long_rows = open_rows(shards)
    lengths = [int((rows.arrays(0, i, 0, 0)["ids"] != rows.rows.pad).sum()) for i in range(3)]
    assert min(lengths) < max(lengths)
    long_rows.length = min(lengths)  # the captions with a longer word do not fit
    log = BadSampleLog(max_fraction=10.0)
    loader = TrainingLoader(
        data,
        seed=3,
        global_batch_size=8,
        transform=CenterCrop(56),
        bad_samples=log,
        row_arrays=long_rows,
    )
    batch = next(loader.batches())
    assert log.count > 0
    assert (batch["ids"] == IMAGE_TOKEN).sum() == 8 * 16


def test_captions_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    shards = make_captioned_shards(tmp_path, count=6)
    first = open_training_data(shards).fingerprint
    assert first == open_training_data(shards).fingerprint
    other = make_captioned_shards(tmp_path / "other", count=6)
    assert open_training_data(other).fingerprint == first
    lines = Path(other) / "texts.json"
    lines.write_text(lines.read_text().replace('"texts.jsonl": "', '"texts.jsonl": "0'))
    assert open_training_data(other).fingerprint != first


def test_row_must_have_space_for_an_image() -> None:
    check_length(32, 16)
    with pytest.raises(UserError, match="an image alone takes 16 tokens"):
        check_length(31, 16)
