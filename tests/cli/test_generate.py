"""``rae-xla generate`` and the pipeline, with a tiny model and a fake hub."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fake_hub import point_at, serving
from huggingface_hub import constants
from PIL import Image

import rae_xla
from rae_xla.cli.main import main
from rae_xla.data.class_names import find_class, imagenet_names
from rae_xla.errors import UserError
from rae_xla.models.pretrained.published import COLLECTION
from rae_xla.sample.tiny_model import write_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DECODER = "decoders/dinov2/wReg_base/ViTXL_n08/model.pt"
STATISTICS = "stats/dinov2/wReg_base/imagenet1k/stat.pt"
DENOISER = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt"
GUIDE = "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt"
FAST = ["--num-steps", "4", "runtime.backend=torch"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return the configuration file of a tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


def generate(out: Path, *arguments: object) -> int:
    return main(["generate", "--out", str(out), *map(str, arguments), *FAST])


def read_listing(out: Path) -> dict:
    return json.loads((out / "generated.json").read_text())


def read_images(out: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(out / p["file"])) for p in listed_images(out)]


def listed_images(out: Path) -> list[dict]:
    return read_listing(out)["pictures"]


def error_message(capsys, out: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert generate(out, *arguments) == 2
    [message] = re.findall(r"^rae-xla: error: .*", capsys.readouterr().err, re.M)
    assert not out.exists() or not list(out.iterdir())
    return message


def write_published(tiny: Path, folder: Path, hub) -> Path:
    """Publish the tiny model and a guide on the fake hub; return its local configuration file."""
    files = tiny.parent
    tree = yaml.safe_load(tiny.read_text())
    shape = tree["stage_2"]["params"] | {"hidden_size": [16, 48], "depth": [1, 1]}
    guide = {"target": "DiTDH", "params": shape}
    weights = io.BytesIO()
    torch.save(rae_xla.instantiate(guide).state_dict(), weights)
    guide["ckpt"] = f"models/{GUIDE}"
    hub.add(
        COLLECTION,
        {
            DECODER: (files / "decoder.pt").read_bytes(),
            STATISTICS: (files / "stat.pt").read_bytes(),
            DENOISER: (files / "stage2_model.pt").read_bytes(),
            GUIDE: weights.getvalue(),
        },
    )
    hub.add_folder("someone/tiny-encoder", files / "encoder")
    params = tree["stage_1"]["params"]
    params["encoder_config_path"] = params["encoder_params"]["dinov2_path"] = "someone/tiny-encoder"
    params["pretrained_decoder_path"] = f"models/{DECODER}"
    params["normalization_stat_path"] = f"models/{STATISTICS}"
    tree["stage_2"]["ckpt"] = f"models/{DENOISER}"
    tree["guidance"] = {"method": "autoguidance", "scale": 1.42, "guidance_model": guide}
    path = folder / "published.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_smoke_needs_no_network_and_reports_noise(tmp_path, monkeypatch, capsys):
    point_at(monkeypatch, "http://127.0.0.1:9")
    out = tmp_path / "out"
    assert generate(out, "--smoke", "--classes", "golden retriever,giant panda") == 0
    assert "noise" in capsys.readouterr().out
    names = [image["class"] for image in listed_images(out)]
    assert names == 4 * ["golden retriever", "giant panda"]
    assert {image["label"] for image in listed_images(out)} == {207, 388}
    images = read_images(out)
    assert {image.shape for image in images} == {(64, 64, 3)}
    assert len({image.tobytes() for image in images}) == 8
    grid = Image.open(out / "grid.png")
    assert grid.size == (4 * (128 + 6) + 6, 2 * (128 + 20 + 6) + 6)  # images, gaps, captions
    assert np.asarray(grid)[-20:-4].min() < 128  # the caption of the last row


def test_image_is_a_function_of_seed_class_and_index(tmp_path, tiny):
    out = {name: tmp_path / name for name in ("one", "two", "seed", "class")}
    common = ["--model", tiny, "--num-samples", 5]
    assert generate(out["one"], *common, "--class-ids", "207,388") == 0
    assert generate(out["two"], *common, "--class-ids", "207,388", "--batch-size", 2) == 0
    assert generate(out["seed"], *common, "--class-ids", "207,388", "--seed", 1) == 0
    assert generate(out["class"], *common, "--class-ids", "207,1") == 0
    one, two, seed, other = (read_images(folder) for folder in out.values())
    for i in range(5):
        assert np.abs(one[i].astype(int) - two[i]).max() <= 1
        assert np.abs(one[i].astype(int) - seed[i]).max() > 20
        assert (one[i] == other[i]).all() == (i % 2 == 0)


def test_only_a_folder_of_an_earlier_command_is_overwritten(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert generate(out, "--model", tiny, "--classes", "tench", "--num-samples", 3) == 0
    assert generate(out, "--model", tiny, "--classes", "goldfish", "--num-samples", 2) == 0
    files = {"000-goldfish.png", "001-goldfish.png", "grid.png", "generated.json"}
    assert {p.name for p in out.iterdir()} == files
    (out / "000-goldfish.png.unfinished").write_bytes(b"")  # left by an interrupted command
    assert generate(out, "--model", tiny, "--classes", "goldfish", "--num-samples", 2) == 0
    assert {p.name for p in out.iterdir()} == files
    (out / "mine.png").write_bytes(b"")
    assert generate(out, "--model", tiny) == 2
    assert "mine.png" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {*files, "mine.png"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes", "panda"], "lesser panda (387), giant panda (388)"),
        (["--classes", "golden retreiver"], "golden retriever (207)"),
        (["--classes", "tench,,"], "commas"),
        (["--class-ids", "1000"], "classes 0 to 999"),
        (["--class-ids", "tench"], "--classes"),
        (["--num-samples", "0"], "--num-samples 0: expected a number of at least 1"),
        (["--batch-size", "0"], "--batch-size 0: expected a number of at least 1"),
        (["--cfg-scale", "0.5"], "--cfg-scale 0.5: expected a number of at least 1"),
        (["guidance.scael=2"], "guidance.scale"),
        (["--model", "ditdh-xl-265"], "did you mean ditdh-xl-256"),
        (["--model", "owner/none.yaml"], "there is no model"),
        (["--class-names", "none.txt"], "none.txt"),
        (["--smoke", "--model", "ditdh-xl-256"], "remove --model"),
    ],
)
def test_mistakes_are_found_before_anything_is_downloaded(
    hub, tmp_path, capsys, arguments, expected
):
    assert expected in error_message(capsys, tmp_path / "out", *arguments)
    assert hub.requests == []


def test_published_files_are_downloaded_and_autoguidance_is_used(hub, tmp_path, tiny, monkeypatch):
    model = write_published(tiny, tmp_path, hub)
    common = ["--model", model, "--class-ids", "1", "--num-samples", 2]
    assert generate(tmp_path / "a", *common, "--cfg-scale", "1.8") == 0
    assert read_listing(tmp_path / "a")["guidance"] == {"method": "autoguidance", "scale": 1.8}
    assert any(GUIDE in request for request in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    assert generate(tmp_path / "b", *common, "--mode", "sde") == 0
    assert len(hub.requests) == requests
    assert read_listing(tmp_path / "b")["guidance"]["scale"] == 1.42
    assert read_listing(tmp_path / "b")["sampler"]["mode"] == "SDE"


def test_download_errors(hub, tmp_path, tiny, capsys, monkeypatch):
    arguments = ["--model", write_published(tiny, tmp_path, hub)]
    hub.faults[DENOISER] = "short"
    assert "interrupted" in error_message(capsys, tmp_path / "a", *arguments)
    hub.faults = {DENOISER: "altered"}
    assert f"{DENOISER} of {COLLECTION} is damaged" in error_message(
        capsys, tmp_path / "a", *arguments
    )
    hub.faults.clear()
    hub.repositories["someone/tiny-encoder"].gated = True
    assert "someone/tiny-encoder is gated" in error_message(capsys, tmp_path / "a", *arguments)
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert "check the network" in error_message(capsys, tmp_path / "a", *arguments)


def test_results_folder_uses_its_trained_weights(tmp_path, tiny):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(tiny.read_text())
    state = torch.load(tiny.parent / "stage2_model.pt", weights_only=True)
    trained = {name: tensor + 0.05 for name, tensor in state.items()}
    torch.save({"ema": trained, "step": 10}, run / "checkpoints/step-00000010.pt")
    for name, model in (("before", tiny), ("after", run)):
        out = tmp_path / name
        assert generate(out, "--model", model, "--class-ids", "1", "--num-samples", 1) == 0
    [before], [after] = read_images(tmp_path / "before"), read_images(tmp_path / "after")
    assert (before != after).any()


def test_saved_folder_and_hub_repository_equal_the_yaml_file(hub, tmp_path, tiny, capsys):
    config = rae_xla.load_config(tiny)
    rae, model = rae_xla.instantiate(config.stage_1), rae_xla.instantiate(config.stage_2)
    model.save_pretrained(tmp_path / "saved", rae)
    rae.save_pretrained(tmp_path / "rae")
    shift = "misc.time_dist_shift_base=64"
    common = ["--class-ids", "1,2", "--num-samples", 2, "--cfg-scale", 2, shift]
    assert generate(tmp_path / "a", "--model", tiny, *common) == 0
    saved = ["--model", tmp_path / "saved"]
    assert "--rae" in error_message(capsys, tmp_path / "none", *saved, *common)
    assert generate(tmp_path / "b", *saved, "--rae", tmp_path / "rae", *common) == 0
    hub.add_folder("someone/tiny", tmp_path / "saved")
    hub.add_folder("someone/tiny", tmp_path / "rae", "rae/")
    assert generate(tmp_path / "c", "--model", "someone/tiny", *common) == 0
    for other in ("b", "c"):
        both = read_images(tmp_path / "a"), read_images(tmp_path / other)
        for one, same in zip(*both, strict=True):
            assert (one == same).all()


def test_class_names_from_a_file(tmp_path, tiny, capsys):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"digit {'abcdefghij'[i % 10]}{i}x" for i in range(1000)))
    common = ["--model", tiny, "--class-names", names, "--num-samples", 1]
    assert generate(tmp_path / "a", *common, "--classes", "digit c12x") == 0
    assert listed_images(tmp_path / "a")[0]["file"] == "000-digit-c12x.png"
    names.write_text("one\ntwo")
    assert "the model has 1000 classes" in error_message(capsys, tmp_path / "b", *common)


def test_find_class_by_name():
    names = imagenet_names()
    assert len(names) == 1000
    # the dog and the garment differ only in case
    assert [find_class(word, names) for word in ("Cardigan", "cardigan")] == [264, 474]
    with pytest.raises(UserError, match=r"Cardigan \(264\), cardigan \(474\)"):
        find_class("CARDIGAN", names)
    assert find_class(" Golden RETRIEVER ", names) == find_class("retriever golden", names) == 207
    with pytest.raises(UserError, match="give its number"):
        find_class("qqqqqqqq", names)
    with pytest.raises(UserError, match="there is no class 'frog'; there are circle, square"):
        find_class("frog", ["circle", "square"])


def test_python_example_of_the_documentation(tmp_path, tiny, monkeypatch):
    """Run it verbatim, except that the model is tiny."""
    page = (ROOT / "docs/generate.md").read_text()
    [lines] = re.findall(r"^```python\n(.*?load_pipeline.*?)^```", page, re.M | re.S)
    assert len(lines.splitlines()) <= 6  # one of them blank
    monkeypatch.chdir(tmp_path)
    settings = f'"{tiny}", overrides=["runtime.backend=torch"], num_steps=4'
    exec(compile(lines.replace('"ditdh-xl-256"', settings), "docs/generate.md", "exec"), {})
    files = sorted(tmp_path.glob("*.png"))
    assert len(files) == 8
    assert Image.open(files[0]).size == (64, 64)
