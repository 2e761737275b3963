"""Best-of-N by CLIPScore, with a tiny CLIP; the other selectors are in ``test_answers``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import write_tiny_clip
from tiny_text_to_image import FAST, write_tiny_text_to_image

from rae_xla.cli.main import main
from rae_xla.sample.clip import ClipScorer
from rae_xla.sample.pipeline import load_pipeline


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = write_tiny_text_to_image(tmp_path_factory.mktemp("t2i"))
    return ["generate", "--model", str(model), "--prompt", "a cat", "--prompt", "zebra", *FAST]


def test_clip_keeps_the_images_with_the_best_scores(command: list[str], tmp_path: Path) -> None:
    clip, out = write_tiny_clip(tmp_path / "clip"), tmp_path / "best"
    more = ["--best-of", "4", "--select", "clip", "--clip", str(clip), "--out", str(out)]
    assert main([*command, *more]) == 0
    listing = json.loads((out / "generated.json").read_text())
    assert listing["select"] == "clip"
    scorer = ClipScorer(clip, torch.device("cpu"))
    pipeline = load_pipeline(command[2], overrides=["runtime.backend=torch"], num_steps=2)
    for image, prompt in zip(listing["pictures"], ["a cat", "zebra"], strict=True):
        candidates, _ = pipeline.generate([prompt], 4)
        scores = scorer.scores(candidates, [prompt] * 4)
        assert len(set(scores)) > 1
        found = {c["number"]: c["score"] for c in image["candidates"]}
        assert [found[i] for i in range(4)] == pytest.approx(scores, abs=1e-3)
        assert image["number"] == int(np.argmax(scores))
        kept = np.asarray(Image.open(out / image["file"]))
        assert np.array_equal(kept, candidates[image["number"]])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--select", "clip", "--clip", "nope"], "CLIPScore needs a CLIP: there is no folder nope"),
        (["--select", "lm-yes", "--clip", "x"], "--clip belongs to --select clip"),
        (["--select", "psychic"], "--select psychic: give one of lm-likelihood, lm-yes, clip"),
        (["--select", "command:"], "--select command:: give one of"),
        (["--select", "command:/none"], "/none cannot be run"),
    ],
)
def test_mistakes_are_one_error(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main([*command, "--best-of", "2", *more, "--out", str(tmp_path / "best")]) == 2
    assert message in capsys.readouterr().err
