"""Questions about images and latents, and best-of-N by what answers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_case import load_case
from PIL import ExifTags, Image
from text_to_image_cases import build_model
from tiny_text_to_image import FAST, write_tiny_text_to_image

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.models.text_to_image.generation import ChooseToken, StopTokens, generate
from rae_xla.models.text_to_image.latents import to_map
from rae_xla.sample.answers import TokenSampling, answer, encode_image, read_image, read_latent
from rae_xla.sample.pipeline import load_pipeline
from rae_xla.sample.selectors import likelihoods, run_command
from rae_xla.sample.text_to_image import TextToImagePipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_to_image(tmp_path_factory.mktemp("t2i"))


@pytest.fixture(scope="module")
def pipeline(saved: Path) -> TextToImagePipeline:
    return load_pipeline(saved, overrides=["runtime.backend=torch"], num_steps=2)


def test_answer_streams_and_latent_equals_its_features(
    pipeline: TextToImagePipeline, tmp_path: Path
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    features = encode_image(pipeline, image)
    parts: list[str] = []
    words = iter(
        [*pipeline.sampler.tokenizer.encode("caf\u00e9!"), pipeline.sampler.tokenizer.turn_end]
    )

    class Fixed(TokenSampling):
        def chooser(self) -> ChooseToken:
            return lambda logits: torch.tensor([next(words)])

    text = answer(pipeline, "What?", features, sampling=Fixed(), on_text=parts.append)
    assert "".join(parts) == text == "caf\u00e9!"
    assert len(parts) > 1
    assert "\ufffd" not in "".join(parts)
    np.save(tmp_path / "latent.npy", to_map(features[None])[0].numpy())
    read = read_latent(pipeline, str(tmp_path / "latent.npy"))
    assert torch.equal(read, features)
    np.save(tmp_path / "other.npy", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(UserError, match=r"has shape \(3, 4, 4\)"):
        read_latent(pipeline, str(tmp_path / "other.npy"))
    with pytest.raises(UserError, match="latents 0 to 0"):
        read_latent(pipeline, str(tmp_path / "latent.npy"), 1)


def test_sampled_tokens_follow_temperature_top_p_and_seed() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(4000, 1)
    counts = TokenSampling(1.0, 1.0, seed=1).chooser()(logits).bincount(minlength=3) / 4000
    assert torch.allclose(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.03)
    counts = TokenSampling(1.0, 0.7, seed=1).chooser()(logits).bincount(minlength=3) / 4000
    assert torch.allclose(counts, torch.tensor([2 / 3, 1 / 3, 0.0]), atol=0.03)
    first, second = (TokenSampling(1.0, seed=2).chooser()(logits) for _ in range(2))
    assert torch.equal(first, second)
    assert set(TokenSampling().chooser()(logits).tolist()) == {0}
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}):
        with pytest.raises(UserError):
            TokenSampling(**wrong)


def test_new_tokens_are_reported_as_they_are_chosen() -> None:
    case = load_case("t2i/generate/greedy_t2i")
    model = build_model(case, tokens=16, channels=10)
    ids = case.meta["special_ids"]
    seen: list[int | None] = []
    [result] = generate(
        model,
        [case["in.t2i.input_ids"].tolist()],
        StopTokens(ids["eos"], ids["im_start"]),
        max_new_tokens=40,
        on_tokens=lambda tokens: seen.append(tokens[0]),
    )
    assert seen == result.ids == case["out.t2i.generated_ids"].tolist()


def test_likelihood_is_that_of_each_token_given_those_before(
    pipeline: TextToImagePipeline,
) -> None:
    _, latents = pipeline.generate(["a cat"], 2, keep_latents=True)
    assert latents is not None
    together = likelihoods(pipeline, "a cat", latents)
    assert together == pytest.approx(
        [likelihoods(pipeline, "a cat", latents[i : i + 1])[0] for i in range(2)], rel=1e-5
    )
    tokenizer, model = pipeline.sampler.tokenizer, pipeline.sampler.model
    asked = tokenizer.prompt(pipeline.question, with_image=True)
    features = torch.from_numpy(latents[:1]).flatten(2).transpose(1, 2)
    text, total = tokenizer.encode("a cat"), 0.0
    for i, token in enumerate(text):  # token by token, through generation
        logits: list[torch.Tensor] = []

        def keep(found: torch.Tensor, logits: list[torch.Tensor] = logits) -> torch.Tensor:
            logits.append(found)
            return found.argmax(-1)

        generate(
            model, [[*asked, *text[:i]]], StopTokens(-1, None), features=[features],
            max_new_tokens=1, choose=keep,
        )  # fmt: skip
        total += float(logits[0].log_softmax(-1)[0, token])
    assert together[0] == pytest.approx(total / len(text), rel=1e-4)
    assert together[0] != pytest.approx(together[1], rel=1e-4)


BRIGHTNESS = """
import json, sys
from PIL import Image
for line in sys.stdin:
    print(sum(Image.open(json.loads(line)["file"]).resize((1, 1)).getpixel((0, 0))))
"""


def test_best_of_keeps_the_highest_scores_and_resumes(saved: Path, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(BRIGHTNESS)
    out = tmp_path / "best"
    select = f"command:{sys.executable} {script}"
    command = ["generate", "--model", str(saved), "--out", str(out), "--best-of", "3"]
    command += ["--select", select, "--prompt", "a cat", "--prompt", "a dog", *FAST]
    assert main(command) == 0
    listing = json.loads((out / "generated.json").read_text())
    best = [image for image in listing["pictures"] if image["rank"] == 0]
    assert [image["prompt"] for image in best] == ["a cat", "a dog"]
    for image in best:
        scores = {c["number"]: c["score"] for c in image["candidates"]}
        assert len(scores) == 3
        assert image["score"] == max(scores.values()) == scores[image["number"]]
    kept = (out / best[0]["file"]).read_bytes()
    # As if the command had been interrupted during the second prompt.
    (out / "generated.json").unlink()
    (out / "scores/00001.json").unlink()
    (out / best[0]["file"]).touch()
    before = (out / best[0]["file"]).stat().st_mtime_ns
    assert main(command) == 0
    assert json.loads((out / "generated.json").read_text()) == listing
    assert (out / best[0]["file"]).read_bytes() == kept
    assert (out / best[0]["file"]).stat().st_mtime_ns == before
    assert main([*command, "--seed", "1"]) == 2


@pytest.mark.parametrize("select", ["lm-likelihood", "lm-yes"])
def test_language_model_selects(saved: Path, tmp_path: Path, select: str) -> None:
    command = ["generate", "--model", str(saved), "--out", str(tmp_path), "--best-of", "2"]
    assert main([*command, "--select", select, "--prompt", "a cat", *FAST]) == 0
    [image] = json.loads((tmp_path / "generated.json").read_text())["pictures"]
    assert [c["rank"] for c in image["candidates"]] == [0, 1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(1)", "printed 1 numbers for 2 images"),
        ("print('a b')", "must print numbers"),
        ("raise SystemExit('no GPU')", "no GPU"),
        ("print('nan 1')", "finite"),
    ],
)
def test_faulty_command_is_one_error(code: str, message: str) -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=message):
        run_command([sys.executable, "-c", code], "a", pixels)


def test_a_rotated_image_is_reported(
    pipeline: TextToImagePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 60)).save(tmp_path / "phone.jpg", exif=exif)
    read_image(pipeline, str(tmp_path / "phone.jpg"))
    assert "--image: images 1 with an EXIF rotation, which is ignored" in caplog.text
