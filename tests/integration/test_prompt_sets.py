"""``rae-xla sample --prompts``: killed and resumed, in two processes: the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import environment, rae_xla, rae_xla_processes
from tiny_text_to_image import FAST, write_tiny_text_to_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_to_image(tmp_path_factory.mktemp("t2i"))


def write_prompts(folder: Path, count: int) -> Path:
    """Write prompts in the format of GenEval's ``evaluation_metadata.jsonl``."""
    objects = ("bench", "cow", "bicycle", "clock", "carrot")
    lines = [
        {
            "tag": "single_object",
            "include": [{"class": objects[i % 5], "count": 1}],
            "prompt": f"a photo of a {objects[i % 5]}, number {i}",
        }
        for i in range(count)
    ]
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(model: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    given = ["sample", "--model", model, "--prompts", prompts, "--layout", "geneval", "--out", out]
    return [str(word) for word in (*given, "--cfg-scale", 2, *more, *FAST)]


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a set."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def kill_and_resume(model: Path, folder: Path, prompts: int, kills: int) -> None:
    path = write_prompts(folder, prompts)
    done = rae_xla(*command(model, path, folder / "whole"))
    assert done.returncode == 0, done.stderr
    out, total = folder / "killed", 4 * prompts
    for number in range(1, kills + 1):
        arguments = command(model, path, out)
        process = subprocess.Popen(
            [sys.executable, "-m", "rae_xla", *arguments],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        least = total * number // (kills + 2)
        while len(list(out.glob("*/samples/*.png"))) < least and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert len(list(out.glob("*/samples/*.png"))) < total
    done = rae_xla(*command(model, path, out))
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(folder / "whole")
    # What GenEval's scorer reads.
    found = [
        name
        for folder_name in os.listdir(out)
        if (out / folder_name).is_dir() and folder_name.isdigit()
        for name in os.listdir(out / folder_name / "samples")
        if re.match(r"\d+\.png", name)
    ]
    assert len(found) == total


def test_set_survives_a_kill_byte_identical(model: Path, tmp_path: Path) -> None:
    kill_and_resume(model, tmp_path, prompts=24, kills=1)


@pytest.mark.nightly
def test_553_prompts_survive_five_kills_byte_identical(model: Path, tmp_path: Path) -> None:
    kill_and_resume(model, tmp_path, prompts=553, kills=5)


@pytest.mark.nightly
def test_two_processes_write_the_same_set(model: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path, 10)
    alone = rae_xla(*command(model, path, tmp_path / "alone", "--keep-latents"))
    assert alone.returncode == 0, alone.stderr
    for done in rae_xla_processes(2, *command(model, path, tmp_path / "two", "--keep-latents")):
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")


def test_folder_of_other_settings_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_prompts(tmp_path, 1)
    assert rae_xla(*command(model, path, tmp_path / "set")).returncode == 0
    other = rae_xla(*command(model, path, tmp_path / "set", "--seed", 1))
    assert other.returncode == 2
    assert "other settings (seed)" in other.stderr
