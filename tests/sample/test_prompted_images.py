"""Images of a folder with their prompts, in every layout; damaged manifests are one error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prompted_sets import write_prompted_set

from rae_xla.errors import UserError
from rae_xla.sample.generated_folder import IMAGES_KEY
from rae_xla.sample.prompted_images import read_prompted_images

LAYOUTS = ("flat", "geneval", "dpg", "generate")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_has_its_prompt(tmp_path: Path, layout: str) -> None:
    folder, pixels, texts = write_prompted_set(tmp_path, layout)
    found = read_prompted_images(folder)
    assert [image.prompt for image in found] == texts
    for image, expected in zip(found, pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(image.path)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_images_are_counted(tmp_path: Path, layout: str) -> None:
    folder, _, _ = write_prompted_set(tmp_path, layout)
    lost = read_prompted_images(folder)[3].path
    lost.unlink()
    expected = f"1 of 6 images are missing, such as {lost.relative_to(folder)}"
    with pytest.raises(UserError, match=expected):
        read_prompted_images(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "there is neither prompts.jsonl"),
        ("prompts.jsonl", "{", "prompts.jsonl cannot be read .*JSON"),
        ("prompts.jsonl", '{"prompt": "a"}', "prompts.jsonl cannot be read .*'file'"),
        ("prompts.jsonl", "[1]", "prompts.jsonl cannot be read"),
        ("prompts.jsonl", "\n", "lists no images"),
        ("generated.json", "{}", f"generated.json cannot be read .*'{IMAGES_KEY}'"),
        ("generated.json", json.dumps({IMAGES_KEY: 3}), "generated.json cannot be read"),
        (
            "generated.json",
            json.dumps({IMAGES_KEY: [{"file": "000-tench.png", "class": "tench"}]}),
            "000-tench.png has no prompt: these images are of classes",
        ),
    ],
)
def test_unreadable_manifests_are_one_error(
    tmp_path: Path, name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompted_images(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        read_prompted_images(tmp_path / "none")
