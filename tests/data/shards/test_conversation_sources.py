"""Conversations with no image, one or several: tars of Scale-RAE and JSON Lines, read in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_captions import COLOURS, png, write_tar

from rae_xla.data.reader import read_image
from rae_xla.data.shards.captioned import index_captioned, index_conversations
from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.stats import shard_stats
from rae_xla.data.shards.texts import TextTable, open_texts, value_at
from rae_xla.data.shards.verify import verify
from rae_xla.errors import UserError

RED, GREEN = png(COLOURS["red"], 1), png(COLOURS["green"], 2)


def talk(question: str, answer: str, **further: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **further}


SAMPLES = [
    talk("draw a red square", "<image>", image_filename="r.png"),
    talk("which is which? <image> <image>", "red, green", image_filename=["r.png", "g.png"]),
    talk("what is 1 + 1?", "2"),
]


def images_of(folder: str, table: TextTable, sample: int) -> list[bytes]:
    index, first = open_index(folder), table.first_image
    assert first is not None
    return [read_image(index, i) for i in range(first[sample], first[sample + 1])]


def check(folder: str) -> None:
    """The three samples, with the images that they name."""
    table = open_texts(folder, len(open_index(folder)))
    assert [table.image_count(i) for i in range(len(table))] == [1, 2, 0]
    assert images_of(folder, table, 0) == [RED]
    assert images_of(folder, table, 1) == [RED, GREEN]
    assert value_at(table[2], "json.conversations.1.value") == "2"
    assert table.has_answers
    assert verify(folder) == []


def test_tars_whose_json_names_the_images(tmp_path: Path) -> None:
    members = [(f"{i:03d}.json", json.dumps(s).encode()) for i, s in enumerate(SAMPLES)]
    missing = talk("<image> what?", "nothing", image_filename="lost.png")
    members.append(("003.json", json.dumps(missing).encode()))
    two = talk("<image>", "one", image_filename=["r.png", "g.png"])
    members.append(("004.json", json.dumps(two).encode()))
    write_tar(tmp_path / "tars/a.tar", [("images/r.png", RED), ("g.png", GREEN), *members])
    found = index_captioned(str(tmp_path / "tars"), str(tmp_path / "index"))
    check(str(tmp_path / "index"))
    assert found.dropped == {
        "an image that the JSON names is not in the tar": 1,
        "a conversation has not as many <image> as images": 1,
    }


def write_lines(folder: Path, records: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_json_lines_read_the_images_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/sub/r.png").write_bytes(RED)
    (tmp_path / "images/g.png").write_bytes(GREEN)
    text = json.dumps(SAMPLES).replace('"r.png"', '"sub/r.png"').replace("image_filename", "image")
    outside = talk("<image>", "no", image="../talks.jsonl")
    lost = talk("<image>", "no", image="lost.png")
    lines = write_lines(tmp_path, [*json.loads(text), outside, lost])
    out = str(tmp_path / "index")
    found = index_conversations(lines, out, images=str(tmp_path / "images"))
    check(out)
    assert found.dropped == {
        "an image is named by a path outside of the folder of images": 1,
        "an image does not exist": 1,
    }
    assert sorted(p.name for p in Path(out).iterdir()) == [
        "images.npy", "index.json", "samples.npy", "texts.json", "texts.jsonl", "texts.npy"
    ]  # fmt: skip
    (tmp_path / "images/g.png").write_bytes(GREEN[:-1] + b"x")
    assert [str(fault) for fault in verify(out)] == [
        "g.png: image 2 changed after the index was written",
        "g.png: changed after the index was written (its SHA-256 differs)",
    ]
    (tmp_path / "images/g.png").unlink()
    with pytest.raises(UserError, match=r"g\.png is missing"):
        open_index(out)


def test_json_lines_without_any_image(tmp_path: Path) -> None:
    lines = write_lines(tmp_path, [SAMPLES[2], SAMPLES[2]])
    index_conversations(lines, str(tmp_path / "index"))
    index = open_index(str(tmp_path / "index"))
    table = open_texts(str(tmp_path / "index"), 0)
    assert (len(index), len(table), table.has_answers) == (0, 2, False)
    assert verify(str(tmp_path / "index")) == []
    with pytest.raises(UserError, match="no image to show statistics of"):
        shard_stats(index)


def test_invalid_lines_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n[]\n')
    with pytest.raises(UserError, match=r"line 2: expected a JSON object"):
        index_conversations(str(tmp_path / "bad.jsonl"), str(tmp_path / "index"))
    lines = write_lines(tmp_path, [{"conversations": [{"from": "human"}]}])
    with pytest.raises(UserError, match="1 sample: the conversation is not valid"):
        index_conversations(lines, str(tmp_path / "index"))
