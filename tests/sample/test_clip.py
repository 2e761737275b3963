"""CLIPScore equals transformers' features by hand, and torchmetrics' value of a set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import TEXT_LENGTH, write_tiny_clip
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPModel, CLIPProcessor

from rae_xla.errors import UserError
from rae_xla.sample.clip import ClipScorer, clip_folder

PROMPTS = ["a red square", "a blue cat", "zebra", "a red square"]
LONG = "a very long description of a cat"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return ClipScorer(folder, CPU)


def colours(count: int) -> np.ndarray:
    """Return noisy images (N, 40, 40, 3) of random colours."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (count, 40, 40, 3))
    return (rng.integers(0, 196, (count, 1, 1, 3)) + noise).astype(np.uint8)


def by_hand(folder: Path, image: np.ndarray, prompt: str) -> float:
    """Return 100 cos(image, prompt), through transformers alone."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    pixels = torch.tensor(image).permute(2, 0, 1)
    seen = processor(images=[pixels], return_tensors="pt")
    read = processor(text=[prompt], return_tensors="pt", truncation=True, max_length=TEXT_LENGTH)
    with torch.no_grad():
        features = (model.get_image_features(**seen), model.get_text_features(**read))
    return float(100 * cosine_similarity(*(found.pooler_output for found in features)))


def test_scores_are_those_of_transformers(folder: Path, scorer: ClipScorer) -> None:
    images, prompts = colours(5), [*PROMPTS, LONG]
    found = scorer.similarities(images, prompts)
    pairs = zip(images, prompts, strict=True)
    assert found == pytest.approx([by_hand(folder, *pair) for pair in pairs], abs=1e-3)
    assert len({round(value, 1) for value in found}) == 5
    assert min(found) < 0 < max(found)  # so that the next line tests something
    assert scorer.scores(images, prompts) == [max(value, 0) for value in found]


def test_long_prompts_keep_their_end(scorer: ClipScorer) -> None:
    """The first tokens alone decide, and the end token is read; torchmetrics would cut it off."""
    image = colours(1)
    [first], [second], [other] = (
        scorer.similarities(image, [text]) for text in (LONG, LONG + " at home", "b" + LONG[1:])
    )
    assert first == second
    assert abs(first - other) > 0.1
    assert (scorer.is_cut(LONG), scorer.is_cut(PROMPTS[0])) == (True, False)


def test_set_has_the_value_of_torchmetrics(scorer: ClipScorer) -> None:
    images = colours(6)[2:]
    with torch.no_grad():
        together = clip_score(scorer.images(images), PROMPTS, scorer.parts)
    found = scorer.similarities(images, PROMPTS)
    assert np.mean(found) == pytest.approx(float(together), abs=1e-3)
    assert min(found) < 0 < 1 < float(together)


def test_fingerprint_is_of_the_weights(folder: Path, scorer: ClipScorer, tmp_path: Path) -> None:
    other = ClipScorer(write_tiny_clip(tmp_path, seed=2), CPU)
    assert ClipScorer(folder, CPU).sha256() == scorer.sha256() != other.sha256()


@pytest.mark.parametrize(
    ("removed", "missing"),
    [
        ("*", "there is no folder"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no model.safetensors"),
        ("processor_config.json", "has no preprocessor_config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_missing_files_are_named_with_their_place(
    folder: Path, tmp_path: Path, removed: str, missing: str
) -> None:
    copy = tmp_path / "clip"
    if removed != "*":
        shutil.copytree(folder, copy)
        (copy / removed).unlink()
    with pytest.raises(UserError, match=missing) as error:
        ClipScorer(copy, CPU)
    for needed in ("config.json, model.safetensors", "tokenizer.json", f"--clip {copy}"):
        assert needed in str(error.value)


def test_other_models_and_partial_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill what is missing with random weights."""
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(UserError, match="of a model of type siglip"):
        ClipScorer(copy, CPU)
    model = CLIPModel.from_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("text_model.")}
    model.save_pretrained(copy, state_dict=state)
    with pytest.raises(UserError, match=r"the weights lack text_model\."):
        ClipScorer(copy, CPU)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "processor_config.json"])
def test_damaged_files_are_one_error(folder: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    (copy / file).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"the CLIP in {copy} cannot be read"):
        ClipScorer(copy, CPU)


def test_default_of_best_of_is_one_error_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"CLIPScore needs a CLIP: .*clip-vit-large.* --clip"):
        clip_folder(None)
