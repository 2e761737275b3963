"""Images from prompts: a saved model and a trained run through the pipeline and the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captions import make_captioned_shards, make_config
from tiny_text_to_image import FAST, write_tiny_text_to_image

from rae_xla.cli.main import main
from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.errors import UserError
from rae_xla.interop.text_to_image import load_text_to_image
from rae_xla.models.rae import RAE
from rae_xla.models.text_to_image.generation import generate
from rae_xla.runtime import start
from rae_xla.sample.pipeline import Pipeline, load_pipeline
from rae_xla.sample.prompt_sampler import RequestFormat
from rae_xla.sample.text_to_image import TextToImagePipeline
from rae_xla.sample.tiny_model import write_tiny_model
from rae_xla.train.trainer import train

TORCH = ["runtime.backend=torch"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_to_image(tmp_path_factory.mktemp("t2i"))


@pytest.fixture(scope="module")
def pipeline(saved: Path) -> TextToImagePipeline:
    loaded = load_pipeline(saved, overrides=TORCH, num_steps=3)
    assert isinstance(loaded, TextToImagePipeline)
    return loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps, with a preview after the second, and return the results folder."""
    folder = tmp_path_factory.mktemp("t2i")
    path = make_config(folder, make_captioned_shards(folder, count=24))
    overrides = ["training.steps=2", "training.sample_every=2", "sampler.params.num_steps=2"]
    config = load_config(path, overrides=overrides)
    data = open_training_data(config.data.train)
    backend = start(config.runtime, config.mesh, seed=0)
    train(config, backend, data, "t2i", folder / "run")
    return folder / "run"


def test_one_entry_point_loads_both_kinds(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    assert isinstance(load_pipeline(write_tiny_model(tmp_path), overrides=TORCH), Pipeline)
    with pytest.raises(UserError, match="generates classes: leave out request"):
        load_pipeline(tmp_path / "config.yaml", request="a {caption}")
    images = pipeline("a cat on a windowsill", num_images=2)
    assert [image.size for image in images] == [(56, 56)] * 2


def test_image_is_a_function_of_seed_prompt_and_number(pipeline: TextToImagePipeline) -> None:
    several, _ = pipeline.generate(["a red square", "blue"], 2, seed=1, batch_size=1)
    alone, _ = pipeline.generate(["blue"], 3, seed=1)
    assert np.array_equal(several[2:], alone[:2])
    pairs = [(alone[0], alone[1]), (several[0], several[2])]
    pairs.append((alone[0], np.asarray(pipeline("blue", seed=2)[0])))
    assert all(np.abs(one.astype(int) - other).max() > 20 for one, other in pairs)


def test_number_of_evaluations_follows_the_guidance(
    pipeline: TextToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    head = pipeline.sampler.model.head
    forward = head.forward

    def counted(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        evaluated.append(len(x))
        return forward(x, *args)

    monkeypatch.setattr(head, "forward", counted)
    rows = pipeline.sampler.rows_per_device(1)
    times = pipeline.sampler._flow.time_grid(4)[:3].tolist()
    cases = {(1.0, None): [1, 1, 1], (3.0, None): [2, 2, 2], (3.0, (0.0, times[1])): [1, 2, 2]}
    for (scale, interval), passes in cases.items():
        evaluated.clear()
        pipeline.configured(cfg_scale=scale, interval=interval).generate(["a"])
        assert [count // rows for count in evaluated] == passes


def test_sde_has_as_many_evaluations_and_other_images(pipeline: TextToImagePipeline) -> None:
    done: list[tuple[int, int]] = []
    stochastic = pipeline.configured(mode="sde")
    one, latents = stochastic.generate(
        ["a"], progress=lambda *steps: done.append(steps), keep_latents=True
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(one, stochastic.generate(["a"])[0])
    assert np.abs(one.astype(int) - pipeline.generate(["a"])[0]).max() > 20
    assert latents is not None
    with torch.no_grad():
        decoded = pipeline.sampler.decode(torch.from_numpy(latents))
    assert np.array_equal(decoded.numpy(), one)


@pytest.mark.parametrize("scale", [0.5, float("nan"), float("inf")])
def test_scales_that_do_not_guide_are_refused(pipeline: TextToImagePipeline, scale: float) -> None:
    with pytest.raises(UserError, match="guidance scale"):
        pipeline("a", cfg_scale=scale)


def test_prompts_without_text_and_endless_ones_are_refused(
    pipeline: TextToImagePipeline, saved: Path
) -> None:
    with pytest.raises(UserError, match="prompt 2 is empty"):
        pipeline(["a", "  "])
    with pytest.raises(UserError, match="10,000 characters"):
        pipeline(["a" * 10_000])
    written = load_pipeline(saved, overrides=TORCH, write_text=True)
    written.sampler.form = RequestFormat(write_text=True, max_new_tokens=2)
    with pytest.raises(UserError, match="without an image"):
        written("a")


def test_written_text_precedes_the_image(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own text is part of its sequence: here one token, then the image."""
    pipeline = load_pipeline(saved, overrides=TORCH, write_text=True)
    start_image = pipeline.sampler.tokenizer.image_start
    answers = iter([7, start_image])

    def choose(logits: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), next(answers))

    def generate_so(*args: object, **options: object) -> object:
        return generate(*args, **options, choose=choose)

    monkeypatch.setattr("rae_xla.sample.prompt_sampler.generate", generate_so)
    [tokens] = pipeline.sampler.tokens(["a"])
    assert tokens == [*pipeline.sampler.tokenizer.prompt("a"), 7, start_image]


def test_command_writes_images_and_one_manifest(saved: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "images", tmp_path / "prompts.txt"
    prompts.write_text(f"a red square\n\n{'b' * 500}\n")
    command = ["generate", "--model", str(saved), "--out", str(out), *FAST, "--cfg-scale", "3"]
    more = ["--prompts", str(prompts), "--num-samples", "2", "--save-latents", "--seed", "5"]
    assert main([*command, *more, "--cfg-interval", "0.1", "0.8"]) == 0
    listing = json.loads((out / "generated.json").read_text())
    found = [(image["prompt"][:3], image["number"], image["seed"]) for image in listing["pictures"]]
    assert found == [("a r", 0, 5), ("a r", 1, 5), ("bbb", 0, 5), ("bbb", 1, 5)]
    assert listing["guidance"] == {"method": "cfg", "scale": 3.0, "t_min": 0.1, "t_max": 0.8}
    assert set(listing["weights"]) == {"text_to_image", "encoder", "decoder"}
    latents = [np.load(out / image["latent"]) for image in listing["pictures"]]
    assert {latent.shape for latent in latents} == {(32, 4, 4)}
    before = np.asarray(Image.open(out / listing["pictures"][2]["file"]))
    # Another command replaces the files of the first, latents included.
    assert main([*command, "--prompt", "b" * 500, "--seed", "5"]) == 0
    assert len(list(out.glob("*.npy"))) == 0
    [image] = json.loads((out / "generated.json").read_text())["pictures"]
    assert before.shape == np.asarray(Image.open(out / image["file"])).shape


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompt", " "], "prompt 1 is empty"),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--prompt", "a", "--request", "draw"], "has no {caption}"),
        (["--prompt", "a", "--select", "clip"], "need --best-of"),
        (["--prompt", "a", "--num-steps", "0"], "at least 2"),
        (["--classes", "tench"], "from prompts: give --prompt"),
    ],
)
def test_mistakes_are_one_error(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    command = ["generate", "--model", str(saved), "--out", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_published_name_without_network_says_what_is_needed_and_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["generate", "--model", "scale-rae-qwen1.5b", "--out", str(tmp_path / "out")]
    assert main([*command, "--prompt", "a cat"]) == 2
    message = capsys.readouterr().err
    for needed in ("Qwen1.5B_DiT2.4B: *.json", "siglip2_decoder: config.json, model.pt", "google/"):
        assert needed in message
    assert "rae-xla hub pull scale-rae-qwen1.5b" in message
    assert "in the cache" in message
    assert main([*command[:2], "scale-rae-qwen15b", *command[3:], "--prompt", "a cat"]) == 2
    assert "did you mean scale-rae-qwen1.5b" in capsys.readouterr().err


def test_run_shows_images_of_the_first_captions_and_generates(run: Path, tmp_path: Path) -> None:
    previews = list((run / "samples").iterdir())
    assert [file.suffix for file in previews] == [".png"] * 2  # before the first step, at the end
    command = ["generate", "--model", str(run), "--out", str(tmp_path / "images"), *FAST]
    assert main([*command, "--prompt", "a red square"]) == 0
    listing = json.loads((tmp_path / "images/generated.json").read_text())
    assert listing["model"].endswith("step-00000002")


def test_exported_folder_is_the_averaged_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "published"
    command = ["checkpoints", "export", str(run), "--what", "text-to-image", "--out", str(out)]
    assert main(command) == 0
    exported, average = load_text_to_image(str(out)), load_text_to_image(str(run))
    state = average.model.state_dict()
    assert all(torch.equal(state[k], t) for k, t in exported.model.state_dict().items())
    assert exported.model.settings == average.model.settings


def test_damaged_and_missing_weights_are_one_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no 'other' weights; it has model, ema"):
        load_text_to_image(str(run), "other")
    checkpoint = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / checkpoint.name, checkpoint)
    [weights] = checkpoint.glob("ema-*.distcp")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"{weights.name} does not match its checksum"):
        load_text_to_image(str(checkpoint))


def test_run_continues_from_another_run(run: Path, tmp_path: Path) -> None:
    shards = make_captioned_shards(tmp_path, count=12)
    config = make_config(
        tmp_path, shards, text_to_image={"ckpt": str(run), "language_model_config": None}
    )
    command = ["train", "t2i", "--config", str(config), "--results-dir", str(tmp_path / "tuned")]
    assert main([*command, "training.steps=1"]) == 0


def test_autoencoder_with_other_latents_is_refused(saved: Path, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden/t2i"
    other = RAE(
        encoder_cls="WebSSLEncoder",
        encoder_config_path=str(golden / "encoder/webssl/hf"),
        encoder_input_size=56,
        decoder_config_path=golden / "decoder/webssl300m_decoder_grid4",
        decoder_patch_size=14,
    )
    other.save_pretrained(tmp_path / "rae")
    with pytest.raises(UserError, match="of 32 channels, but the autoencoder has 16 of 24"):
        load_pipeline(saved, rae=tmp_path / "rae", overrides=TORCH)
