"""``rae-xla evaluate t2i``: CLIPScore, FID against captioned shards, and validation losses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted_sets import write_prompted_set
from random_networks import SmallFeatures
from text_to_image_runs import Runs
from tiny_captions import make_captioned_shards, make_config
from tiny_clip import write_tiny_clip
from torchmetrics.functional.multimodal import clip_score

from rae_xla.cli.main import main
from rae_xla.sample.clip import ClipScorer

TORCH = "runtime.backend=torch"
Command = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_captioned_shards(tmp_path_factory.mktemp("shards"), count=12)


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command, and returns its report and what it printed."""

    def run(*arguments: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / "report.json"
        command = ["evaluate", "t2i", "--out", str(out), *map(str, arguments)]
        status = main(command)
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(out.read_text()), printed.out

    return run


def test_clip_score_of_several_sets(clip: Path, tmp_path: Path, evaluate: Command) -> None:
    sets = [write_prompted_set(tmp_path / layout, layout) for layout in ("geneval", "generate")]
    folders = [str(folder) for folder, _, _ in sets]
    report, printed = evaluate("--samples", *folders, "--clip", clip, "--num-images", 4, TORCH)
    scorer = ClipScorer(clip, torch.device("cpu"))
    _, pixels, texts = sets[0]
    with torch.no_grad():
        expected = float(clip_score(scorer.images(pixels[:4]), texts[:4], scorer.parts))
    entry = report["metrics"]["clip_score"]
    assert entry == {"value": entry["value"], "spread": 0.0, "unit": None, "images": 4}
    assert entry["value"] == pytest.approx(expected, abs=1e-3)
    assert expected > 1
    assert [one["path"] for one in report["sets"]] == folders
    assert report["weights"] == {"clip": f"{clip} (sha256 {scorer.sha256()})"}
    assert re.search(rf"^  clip_score +{entry['value']:.6f} \+- 0\.0", printed, re.M)


def test_images_are_compared_with_captioned_shards(
    clip: Path,
    shards: str,
    tmp_path: Path,
    evaluate: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rae_xla.evaluate.generation.load_inception", lambda *_: SmallFeatures())
    folder, _, _ = write_prompted_set(tmp_path / "set", "dpg")
    metrics = ["--metrics", "precision", "clip_score", "recall"]
    options = ["--samples", folder, "--clip", clip, "--reference", shards, TORCH]
    report, printed = evaluate(*metrics, *options)
    assert list(report["metrics"]) == ["clip_score", "precision", "recall"]
    assert {entry["images"] for entry in report["metrics"].values()} == {6}
    assert report["reference"]["kind"] == "originals"
    assert report["reference"]["count"] == 12
    assert f"the 12 originals in {report['reference']['path']}" in printed
    assert set(report["weights"]) == {"inception", "clip"}


def test_validation_losses_are_those_of_training(
    shards: str, tmp_path: Path, evaluate: Command
) -> None:
    """Of the average and of the weights themselves; from the run's configuration and from YAML."""
    project = Runs(tmp_path, make_config(tmp_path, shards))
    settings = ["training.steps=2", "eval.eval_interval=2", "eval.num_images=10"]
    lines = project.train("run", *settings, "eval.batch_size=4", f"data.val={shards}")
    [trained] = [line for line in lines if "eval/image_loss" in line]
    expected = {n.removeprefix("eval/"): v for n, v in trained.items() if n.startswith("eval/")}
    expected = {name: value for name, value in expected.items() if "loss" in name or "acc" in name}
    report, printed = evaluate("--ckpt", tmp_path / "run")
    found = {name: entry["value"] for name, entry in report["metrics"].items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(found) == 11
    assert report["validation"]["images"] == 10
    assert report["validation"]["checkpoint"].endswith("step-00000002")
    assert f"image_loss         {found['image_loss']:11.6f}" in printed
    again, _ = evaluate(
        "--config", project.config, "--ckpt", tmp_path / "run", "--data", shards, "--num-images", 10
    )
    for name, entry in again["metrics"].items():  # the batch size is another one
        assert entry["value"] == pytest.approx(found[name], rel=1e-5)
    raw, _ = evaluate("--ckpt", tmp_path / "run", "--weights", "model")
    assert raw["metrics"]["image_loss"]["value"] != found["image_loss"]
    assert raw["validation"]["weights"] == "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "needs --samples FOLDER with --clip FOLDER or --reference SHARDS"),
        (
            "--samples SET",
            "CLIPScore needs a CLIP: .*config.json, model.safetensors.*--clip FOLDER",
        ),
        ("--samples SET --clip SET/none", "there is no folder .*none; copy the files config.json"),
        ("--samples SET --clip SET", "has no config.json, model.safetensors, preprocessor_config"),
        ("--clip CLIP", "clip_score needs --samples FOLDER"),
        ("--samples CLIP --clip CLIP", "neither prompts.jsonl .* nor generated.json"),
        ("--samples SET --metrics fid", "fid needs --reference SHARDS"),
        ("--samples SET --clip CLIP --metrics is", "--metrics is: evaluate t2i has clip_score fid"),
        ("--metrics validation_loss", "validation_loss needs --ckpt PATH"),
        ("--ckpt CLIP", "is not a run, .*give --config FILE"),
        ("--ckpt SET/none", "there is no text-to-image model"),
        ("--samples SET --clip CLIP --data x", "--data is not used by --metrics clip_score"),
        ("--samples SET --clip CLIP --out CLIP/config.json", "--out .* is a file of the input"),
        ("--samples SET --clip CLIP --num-images 7", "7 images were requested .* which has 6"),
        ("--samples SET --latents x", "--latents applies to `rae-xla evaluate decoders`, not t2i"),
    ],
)
def test_mistakes_are_one_error(
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    folder, _, _ = write_prompted_set(tmp_path / "set", "flat")
    paths = arguments.replace("SET", str(folder)).replace("CLIP", str(clip))
    assert main(["evaluate", "t2i", *paths.split(), TORCH]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("rae-xla: error") == 1


def test_a_missing_image_is_one_error(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = write_prompted_set(tmp_path, "geneval")
    (folder / "00001/samples/0001.png").unlink()
    assert main(["evaluate", "t2i", "--samples", str(folder), "--clip", str(clip), TORCH]) == 2
    assert "1 of 6 images are missing, such as 00001/samples/0001.png" in capsys.readouterr().err
