"""The catalogue says what our configuration files and the hub's collection say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import serving

from rae_xla.cli.main import main
from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.interop.published import (
    AUTOENCODERS,
    COLLECTION,
    DIFFUSERS,
    ENCODER_FILES,
    GENERATORS,
    Denoiser,
    fetch,
    files_of,
    names,
    published_config,
)
from rae_xla.models.vit_decoder import DecoderConfig
from rae_xla.registry import instantiate

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sampling").glob("*.yaml")))
def test_a_generator_is_that_of_its_configuration_file(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    theirs = load_config(path)
    ours = published_config(path.stem.replace("_", "-"))
    decoders = [c.stage_1.params.pop("decoder_config_path") for c in (ours, theirs)]
    assert ours == theirs
    assert DecoderConfig.read(decoders[0]) == DecoderConfig.read(decoders[1])


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_that_of_its_configuration_file(name):
    file = name.removeprefix("rae-").replace("-", "_") + ".yaml"
    path = ROOT / "configs/stage1/pretrained" / file
    theirs = yaml.safe_load(path.read_text())["stage_1"]
    ours = AUTOENCODERS[name].section()
    folder = ROOT / theirs["params"].pop("decoder_config_path")
    decoder = json.loads((folder / "config.json").read_text())
    assert ours["params"].pop("decoder_config_path").items() <= decoder.items()
    assert ours == theirs
    assert name in DIFFUSERS


def test_every_name_has_files():
    for name in names():
        assert all(files_of(name).values())
    assert len(GENERATORS) == 6
    with pytest.raises(UserError, match="did you mean ditdh-xl-256"):
        files_of("ditdh-xl-265")
    with pytest.raises(UserError, match="no published generator"):
        published_config("rae-mae-b-256")


@pytest.mark.parametrize(("size", "millions"), [("S", 196), ("XL", 839)])
def test_a_denoiser_has_as_many_parameters_as_was_published(size, millions):
    spec = Denoiser(size, "").section(16) | {"ckpt": None}
    with torch.device("meta"):
        model = instantiate(spec)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """All that a guided generator is made of, each file with its path as its content."""
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as hub:
        for repository, paths in files_of("ditdh-xl-256-autoguidance").items():
            hub.add(repository, {path: path.encode() for path in (*paths, "more.bin")})
        yield hub


def test_what_a_generator_is_made_of_is_downloaded(hub):
    config = fetch(published_config("ditdh-xl-256-autoguidance"))
    rae, guide = config.stage_1.params, config.guidance.guidance_model
    files = [rae["pretrained_decoder_path"], rae["normalization_stat_path"]]
    for file in (*files, config.stage_2.ckpt, guide.ckpt):
        assert Path(file).is_file()
        assert file.endswith(Path(file).read_text())
    encoder = Path(rae["encoder_config_path"])
    assert rae["encoder_params"]["dinov2_path"] == str(encoder)
    assert {path.name for path in encoder.iterdir()} == set(ENCODER_FILES)


def test_a_file_that_is_here_is_not_downloaded(hub):
    config = published_config("ditdh-xl-256")
    here = Path(config.stage_2.ckpt)
    here.parent.mkdir(parents=True)
    here.write_text("mine")
    assert fetch(config).stage_2.ckpt == str(here)
    assert not any("stage2_model.pt" in request for request in hub.requests)


def test_pulled_files_lie_where_configurations_look(hub, tmp_path, capsys):
    assert main(["hub", "pull", "ditdh-xl-256-autoguidance", "--to", "models"]) == 0
    said = capsys.readouterr().out
    for path in files_of("ditdh-xl-256-autoguidance")[COLLECTION]:
        assert (tmp_path / "models" / path).read_text() == path
        assert path in said
    assert "7 files" in said
    assert main(["hub", "pull", "ditdh-xl-265"]) == 2
    assert "did you mean ditdh-xl-256" in capsys.readouterr().err
    assert main(["hub", "pull", "ditdh-xl-256", "--files", "*.pt"]) == 2
    assert "go with a repository" in capsys.readouterr().err
    assert main(["hub", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*names(), *DIFFUSERS.values()))


def test_overrides_count():
    config = published_config("ditdh-xl-256", ["guidance.scale=1.8", "sampler.mode=SDE"])
    assert config.guidance.scale == 1.8
    assert config.sampler.mode == "SDE"
