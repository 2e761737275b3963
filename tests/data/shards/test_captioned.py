"""Indexing tars of images with captions: layouts, filters, faults, the table of texts."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from tiny_captions import captioned_members, png, write_tar

from rae_xla.data.reader import read_image
from rae_xla.data.shards.captioned import index_captioned
from rae_xla.data.shards.sample_filter import SampleFilter
from rae_xla.data.shards.texts import open_texts, value_at
from rae_xla.data.shards.verify import verify
from rae_xla.errors import UserError

RED = png((200, 0, 0), 0)
CONVERSATION = [{"from": "human", "value": "Draw"}, {"from": "gpt", "value": "<image>"}]
# Layout -> the members of its first sample, and where its caption is.
LAYOUTS = {
    "blip3o": ([("k.jpg", RED), ("k.txt", b"a cat")], "txt", "a cat"),
    "img2dataset": (
        [("k.jpg", RED), ("k.txt", b"a cat"), ("k.json", b'{"caption": "a cat, seen"}')],
        "json.caption",
        "a cat, seen",
    ),
    "text-to-image-2m": (
        [("k.png", RED), ("k.json", b'{"prompt": "a cat", "enhanced_prompt": "a fine cat"}')],
        "json.enhanced_prompt",
        "a fine cat",
    ),
    "scale-rae": (
        [
            ("k.json", json.dumps({"conversations": CONVERSATION}).encode()),
            ("k.jpg", RED),
        ],
        "json.conversations.0.value",
        "Draw",
    ),
}


def index(folder: Path, members: list[tuple[str, bytes]], **options: object) -> tuple:
    write_tar(folder / "tars/a.tar", members)
    found = index_captioned(str(folder / "tars"), str(folder / "index"), **options)  # type: ignore[arg-type]
    return found, open_texts(str(folder / "index"), len(found.index))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_right_pairs(layout: str, tmp_path: Path) -> None:
    members, path, caption = LAYOUTS[layout]
    found, texts = index(tmp_path, members)
    assert len(found.index) == len(texts) == 1
    assert read_image(found.index, 0) == RED
    assert value_at(texts[0], path) == caption


def test_every_image_keeps_its_caption(tmp_path: Path) -> None:
    members = list(captioned_members(12))
    found, texts = index(tmp_path, members)
    images = [content for name, content in members if name.endswith(".png")]
    captions = [content.decode() for name, content in members if name.endswith(".txt")]
    assert [read_image(found.index, i) for i in range(12)] == images
    assert [texts[i]["txt"] for i in range(12)] == captions
    again = pickle.loads(pickle.dumps(texts))
    assert again[7] == texts[7]
    assert found.index.class_names == ("image",)


def test_unusable_samples_are_counted_by_reason(tmp_path: Path) -> None:
    found, texts = index(
        tmp_path,
        [
            ("a.png", RED),  # no caption
            *[("b.png", RED), ("b.jpg", RED), ("b.txt", b"two images")],
            ("c.txt", b"no image"),
            *[("d.png", RED), ("d.json", b"{")],
            *[("e.png", RED), ("e.txt", b" \n")],
            *[("f.png", RED), ("f.txt", b"fine")],
        ],
    )
    assert dict(found.dropped) == {
        "the caption is missing or too short": 2,
        "there are two images": 1,
        "there is no image": 1,
        "the .json member is not valid": 1,
    }
    assert texts[0]["txt"] == "fine"


def test_filters_leave_samples_out(tmp_path: Path) -> None:
    sample = [("a.png", png((0, 0, 0), 0, size=20)), ("a.json", b'{"caption": "x", "score": 5}')]
    good = [("b.png", RED), ("b.json", b'{"caption": "long enough", "score": 6.5}')]
    accept = SampleFilter(min_side=30)
    assert len(index(tmp_path / "side", sample + good, accept=accept)[0].index) == 1
    accept = SampleFilter(min_chars=5)
    assert len(index(tmp_path / "chars", sample + good, accept=accept)[0].index) == 1
    accept = SampleFilter(score="json.score", min_score=6)
    assert len(index(tmp_path / "score", sample + good, accept=accept)[0].index) == 1
    with pytest.raises(UserError, match=r"none of the samples can be used: 2 samples: json\.other"):
        index(tmp_path / "none", sample + good, accept=SampleFilter(score="json.other"))


def test_sidecar_has_captions_by_key(tmp_path: Path) -> None:
    sidecar = tmp_path / "captions.jsonl"
    sidecar.write_text('{"key": "a", "long": "an image of red"}\n')
    found, texts = index(tmp_path, [("a.png", RED), ("b.png", RED)], sidecar=str(sidecar))
    assert len(found.index) == 1
    assert value_at(texts[0], "sidecar.long") == "an image of red"
    sidecar.write_text('{"key": "a"\n')
    with pytest.raises(UserError, match="line 1"):
        index(tmp_path / "again", [("a.png", RED)], sidecar=str(sidecar))


def test_damaged_tar_is_one_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/a.tar", captioned_members(3))
    tar = tmp_path / "tars/a.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a complete tar"):
        index_captioned(str(tmp_path / "tars"), str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_existing_index_is_not_replaced(tmp_path: Path) -> None:
    index(tmp_path, list(captioned_members(3)))
    with pytest.raises(UserError, match="exists already"):
        index_captioned(str(tmp_path / "tars"), str(tmp_path / "index"))


def test_texts_that_do_not_belong_to_the_index_are_refused(tmp_path: Path) -> None:
    index(tmp_path, list(captioned_members(3)))
    folder = str(tmp_path / "index")
    with pytest.raises(UserError, match="3 captions for 3 images, the index has 4"):
        open_texts(folder, 4)
    table = tmp_path / "index/texts.npy"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"texts\.npy is not the one"):
        open_texts(folder, 3)
    (tmp_path / "index/texts.json").unlink()
    with pytest.raises(UserError, match="has no captions"):
        open_texts(folder, 3)


def test_paths_select_lines_and_elements() -> None:
    texts = {"txt": "first\nsecond", "json": {"list": ["a", {"b": "c"}]}}
    assert value_at(texts, "txt.1") == "second"
    assert value_at(texts, "txt.-1") == "second"
    assert value_at(texts, "json.list.1.b") == "c"
    for missing in ("txt.2", "json.list.9", "json.other.x", "sidecar"):
        assert value_at(texts, missing) is None


def test_members_need_not_be_adjacent_but_must_not_repeat(tmp_path: Path) -> None:
    """``tar --concatenate`` may repeat a key; its second image is not that of the first text."""
    other = png((0, 0, 200), 1)
    members = [("a.png", RED), ("b.png", other), ("a.txt", b"red"), ("b.txt", b"\xef\xbb\xbfblue")]
    found, texts = index(tmp_path / "apart", members)
    assert [read_image(found.index, i) for i in range(2)] == [RED, other]
    assert [texts[i]["txt"] for i in range(2)] == ["red", "blue"]
    members = [("a.png", RED), ("a.txt", b"x"), ("b.png", RED), ("b.txt", b"y"), ("a.png", other)]
    found, _ = index(tmp_path / "twice", members)
    assert dict(found.dropped) == {"the key appears a second time": 1}
    assert found.first_dropped == {"the key appears a second time": "a.tar: a"}


def test_keys_of_a_sidecar_without_a_sample_are_counted(tmp_path: Path, caplog) -> None:
    sidecar = tmp_path / "captions.jsonl"
    sidecar.write_text('{"key": "a", "x": "red"}\n{"key": "tars/b", "x": "blue"}\n')
    index(tmp_path, [("a.png", RED), ("b.png", RED)], sidecar=str(sidecar))
    assert f"{sidecar}: 1 of 2 keys are of no sample" in caplog.text


def test_everything_is_counted_by_index_and_verify(tmp_path: Path, caplog) -> None:
    """Rotated images, members that are not used, and other files in the folder."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 60)).save(buffer, "JPEG", exif=exif)
    tars = tmp_path / "tars"
    members = [("a.jpg", buffer.getvalue()), ("a.txt", b"x"), (".b.txt", b"y"), ("a.npy", b"z")]
    write_tar(tars / "a.tar", members)
    (tars / "notes.md").touch()
    caplog.set_level("INFO")
    index_captioned(str(tars), str(tars))
    counted = [
        f"{tars}: members of the tars: left out 1 .npy (a.npy), 1 hidden (.b.txt)",
        f"{tars}: images 1 with an EXIF rotation, which is ignored (a.tar: a.jpg)",
    ]
    assert caplog.messages == [f"{tars}: left out 1 .md (notes.md)", *counted]
    caplog.clear()
    assert verify(str(tars)) == []
    counted[1] = counted[1].replace("a.jpg", "image 0")
    assert caplog.messages == [*counted, f"{tars}: left out 1 .md (notes.md)"]
    write_tar(tars / "b.tar", members)
    with (tars / "a.tar").open("ab") as file:
        file.write(b"x")
    faults = [str(fault) for fault in verify(str(tars))]
    assert [fault.split(":")[0] for fault in faults] == ["a.tar", "b.tar"]
    assert faults[1] == "b.tar: is in the folder but not in the index"


def test_what_there_is_instead_of_samples_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can be used: there is none \(left out: 1 \.dng \(a\.dng"):
        index(tmp_path, [("a.dng", RED)])


def test_damaged_facts_of_texts_are_one_error(tmp_path: Path) -> None:
    found, _ = index(tmp_path, [("a.png", RED), ("a.txt", b"x")])
    (tmp_path / "index/texts.json").write_text("[]")
    with pytest.raises(UserError, match=r"texts\.json: the captions cannot be read"):
        open_texts(str(tmp_path / "index"), len(found.index))
