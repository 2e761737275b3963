"""Prompt files, and the folder layouts of sets of images from prompts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_xla.config.paths import StoragePath
from rae_xla.errors import UserError
from rae_xla.sample.images import save_png
from rae_xla.sample.prompt_files import PROMPTS_FILE, PromptFiles
from rae_xla.sample.prompts import Prompt, noise_key, read_prompts


def test_every_format_gives_text_and_name(tmp_path: Path) -> None:
    line = json.dumps({"tag": "counting", "prompt": "two dogs"})
    (tmp_path / "meta.jsonl").write_text(f"{line}\n\n{json.dumps({'prompt': 'x', 'id': 7})}\n")
    assert read_prompts(str(tmp_path / "meta.jsonl")) == [
        Prompt("two dogs", "00000", line),
        Prompt("x", "7", '{"prompt": "x", "id": 7}'),
    ]
    (tmp_path / "by_id.json").write_text('{"stanford3": "a cat"}')
    assert read_prompts(str(tmp_path / "by_id.json")) == [Prompt("a cat", "stanford3")]
    (tmp_path / "lines.txt").write_bytes("\ufeffa\n\nb\n".encode())
    assert read_prompts(str(tmp_path / "lines.txt")) == [Prompt("a", "00000"), Prompt("b", "00001")]
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/12.txt").write_text("a long prompt\n")
    assert read_prompts(str(tmp_path / "dpg")) == [Prompt("a long prompt", "12")]


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\r\n', encoding="utf-8", newline="")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.jsonl"))] == ["a\u2028b"]
    (tmp_path / "a.txt").write_text("a\x85b\rc\n", encoding="utf-8", newline="")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["a\x85b", "c"]


def test_other_files_of_a_folder_of_prompts_are_counted(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    (tmp_path / "b").mkdir()
    (tmp_path / "a.md").touch()
    (tmp_path / "._a.txt").touch()
    found = "1 .md (a.md), 1 folder (b), 1 hidden (._a.txt)"
    with pytest.raises(UserError, match=re.escape(f"has no .txt files (it contains {found})")):
        read_prompts(str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert read_prompts(str(tmp_path)) == [Prompt("x", "a")]
    assert caplog.messages == [f"--prompts {tmp_path}: left out {found}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}', "line 1: there is no text in 'prompt'"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", '\n\n{"prompt": "x"}\n\n{', "line 5 is not JSON"),
        ("a.json", '{"a/b": "x"}', "the id 'a/b' cannot be the name of a file"),
        ("a.json", '{"a": 1}', "'a' has no text"),
        ("a.jsonl", '{"prompt":"x","id":1}\n{"prompt":"y","id":"1"}', "two prompts have the id"),
        ("a.txt", "\n", "there is no prompt"),
        ("a.txt", "a\n" + "b" * 9000, "prompt 2 has 9,000 characters"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompts(str(tmp_path / name))


def test_keys_are_those_of_the_prompt_alone() -> None:
    keys = {noise_key(f"prompt {i}") for i in range(1000)}
    assert len(keys) == 1000
    assert noise_key("a cat") == noise_key("a cat")
    assert all(-(2**31) <= half < 2**31 for key in keys for half in key)


def write_all(files: PromptFiles) -> None:
    files.prepare()
    for i in range(files.count):
        save_png(files.path(i), np.full((8, 8, 3), i, np.uint8))
    files.finish()


def geneval_images(folder: Path) -> list[tuple[str, dict]]:
    """Return what GenEval's ``evaluate_images.py`` finds, by the rules of its main loop."""
    found = []
    for name in os.listdir(folder):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((folder / name / "metadata.jsonl").read_text())
        for image in os.listdir(folder / name / "samples"):
            if re.match(r"\d+\.png", image):
                found.append((f"{name}/samples/{image}", metadata))
    return found


def test_geneval_scorer_finds_every_image_with_its_metadata(tmp_path: Path) -> None:
    lines = [json.dumps({"tag": "t", "prompt": f"p{i}"}) for i in range(3)]
    prompts = [Prompt(f"p{i}", f"{i:05d}", line) for i, line in enumerate(lines)]
    files = PromptFiles(StoragePath(tmp_path), "geneval", prompts, 4)
    write_all(files)
    found = dict(geneval_images(tmp_path))
    assert len(found) == 12
    assert found["00002/samples/0003.png"] == {"tag": "t", "prompt": "p2"}
    assert files.existing() == set(range(12))
    os.remove(files.path(5))
    assert files.existing() == set(range(12)) - {5}


def test_dpg_scorer_finds_grids_of_four(tmp_path: Path) -> None:
    files = PromptFiles(StoragePath(tmp_path), "dpg", [Prompt("a", "x1"), Prompt("b", "x2")], 4)
    write_all(files)
    assert sorted(os.listdir(tmp_path / "grids")) == ["x1.png", "x2.png"]
    grid = np.asarray(Image.open(tmp_path / "grids/x2.png"))
    assert grid.shape == (16, 16, 3)
    # The scorer's crops: left to right, then top to bottom.
    assert [int(grid[y, x, 0]) for y in (0, 8) for x in (0, 8)] == [4, 5, 6, 7]
    with pytest.raises(UserError, match="at most 4 images of a prompt, not 5"):
        PromptFiles(StoragePath(tmp_path), "dpg", [Prompt("a", "x1")], 5)


def test_prompts_are_listed_with_flat_images(tmp_path: Path) -> None:
    files = PromptFiles(StoragePath(tmp_path), "flat", [Prompt("a", "0"), Prompt("b", "1")], 2)
    write_all(files)
    lines = [json.loads(line) for line in (tmp_path / PROMPTS_FILE).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "a", "b", "b"]
    assert all((tmp_path / line["file"]).is_file() for line in lines)
