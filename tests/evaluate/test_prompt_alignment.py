"""CLIPScore of image sets: torchmetrics' value, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_host import Host, on_hosts
from prompted_sets import write_prompted_set
from tiny_clip import TEXT_LENGTH, write_tiny_clip
from torchmetrics.functional.multimodal import clip_score as of_torchmetrics

from rae_xla.errors import UserError
from rae_xla.evaluate.generation import GenReport
from rae_xla.evaluate.prompt_alignment import clip_score, cut_prompts_warning, with_clip_scores
from rae_xla.sample.clip import ClipScorer
from rae_xla.sample.prompted_images import PromptedImage, read_prompted_images


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> ClipScorer:
    return ClipScorer(write_tiny_clip(tmp_path_factory.mktemp("clip")), torch.device("cpu"))


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_score_of_a_set_is_that_of_torchmetrics(
    scorer: ClipScorer, tmp_path: Path, layout: str
) -> None:
    folder, pixels, texts = write_prompted_set(tmp_path, layout)
    images = read_prompted_images(folder)
    found = clip_score(images, scorer, Host())
    with torch.no_grad():
        expected = float(of_torchmetrics(scorer.images(pixels), texts, scorer.parts))
        shuffled = float(of_torchmetrics(scorer.images(pixels[::-1]), texts, scorer.parts))
    assert found == pytest.approx(expected, abs=1e-3)
    assert expected > 1
    assert abs(expected - shuffled) > 1  # the pairs matter
    for processes in (2, 3):
        assert (
            on_hosts(processes, processes, lambda host: clip_score(images, scorer, host))
            == [found] * processes
        )


def test_unreadable_images_and_scores_are_one_error(scorer: ClipScorer, tmp_path: Path) -> None:
    folder, _, _ = write_prompted_set(tmp_path, "flat")
    images = read_prompted_images(folder)
    images[1].path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000001\.png: not a readable image"):
        clip_score(images, scorer, Host())
    broken = ClipScorer(scorer.folder, torch.device("cpu"))
    model, _ = broken.parts()
    with torch.no_grad():
        model.model.text_projection.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite: check the weights in"):
        clip_score(images[:1], broken, Host())


def test_cut_prompts_are_counted_once(scorer: ClipScorer) -> None:
    texts = ["short", "short", "x" * (TEXT_LENGTH - 2), "y" * (TEXT_LENGTH - 1)]
    images = [PromptedImage(Path("a.png"), text) for text in texts]
    [warning] = cut_prompts_warning(images, scorer)
    assert warning.startswith(f"1 of 3 prompts are longer than the {TEXT_LENGTH} tokens")
    assert cut_prompts_warning(images[:3], scorer) == ()


def test_report_has_both_kinds_of_metrics() -> None:
    report = GenReport((("a", {"fid": 2.0}), ("b", {"fid": 4.0})), 5, 8, None, {}, ("few",))
    report = with_clip_scores(report, {"a": 30.0, "b": 20.0}, ("cut",))
    assert report.metric_names == ("clip_score", "fid")
    assert (report.mean("clip_score"), report.mean("fid")) == (25.0, 3.0)
    assert report.warnings == ("few", "cut")
