"""The table of published models against our configuration files; downloads."""

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
from rae_xla.interop.instantiate import instantiate
from rae_xla.interop.published import fetch, published_config
from rae_xla.models.decoder import DecoderConfig
from rae_xla.models.pretrained.published import (
    AUTOENCODERS,
    COLLECTION,
    DIFFUSERS,
    ENCODER_FILES,
    GENERATORS,
    Denoiser,
    published_files,
    published_names,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sampling").glob("*.yaml")))
def test_generators_match_the_configuration_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    from_file = load_config(path)
    from_table = published_config(path.stem.replace("_", "-"))
    decoders = [c.stage_1.params.pop("decoder_config_path") for c in (from_table, from_file)]
    assert from_table == from_file
    assert DecoderConfig.read(decoders[0]) == DecoderConfig.read(decoders[1])


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_match_the_configuration_files(name):
    file = name.removeprefix("rae-").replace("-", "_") + ".yaml"
    path = ROOT / "configs/stage1/pretrained" / file
    theirs = yaml.safe_load(path.read_text())["stage_1"]
    ours = AUTOENCODERS[name].section()
    folder = ROOT / theirs["params"].pop("decoder_config_path")
    decoder = json.loads((folder / "config.json").read_text())
    assert ours["params"].pop("decoder_config_path").items() <= decoder.items()
    assert ours == theirs
    assert name in DIFFUSERS or name.startswith("raev2-")


def test_every_published_name_has_files():
    for name in published_names():
        assert all(published_files(name).values())
    assert len(GENERATORS) == 7
    with pytest.raises(UserError, match="did you mean ditdh-xl-256"):
        published_files("ditdh-xl-265")
    with pytest.raises(UserError, match="not a published generator"):
        published_config("rae-mae-b-256")


def test_raev2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = instantiate(GENERATORS["raev2-ditdh-xl-256"].stage_2() | {"ckpt": None})
    assert sum(p.numel() for p in model.parameters()) == 875_216_500


@pytest.mark.parametrize(("size", "millions"), [("S", 196), ("XL", 839)])
def test_denoisers_have_the_published_number_of_parameters(size, millions):
    spec = Denoiser(size, "").section(16) | {"ckpt": None}
    with torch.device("meta"):
        model = instantiate(spec)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the files of a guided generator; the content of a file is its path."""
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as hub:
        for repository, paths in published_files("ditdh-xl-256-autoguidance").items():
            hub.add(repository, {path: path.encode() for path in (*paths, "more.bin")})
        yield hub


def test_fetch_downloads_all_files_of_a_generator(hub):
    config = fetch(published_config("ditdh-xl-256-autoguidance"))
    rae, guide = config.stage_1.params, config.guidance.guidance_model
    files = [rae["pretrained_decoder_path"], rae["normalization_stat_path"]]
    for file in (*files, config.stage_2.ckpt, guide.ckpt):
        assert Path(file).is_file()
        assert file.endswith(Path(file).read_text())
    encoder = Path(rae["encoder_config_path"])
    assert rae["encoder_params"]["dinov2_path"] == str(encoder)
    assert {path.name for path in encoder.iterdir()} == set(ENCODER_FILES)


def test_existing_files_are_not_downloaded(hub):
    config = published_config("ditdh-xl-256")
    existing = Path(config.stage_2.ckpt)
    existing.parent.mkdir(parents=True)
    existing.write_text("mine")
    assert fetch(config).stage_2.ckpt == str(existing)
    assert not any("stage2_model.pt" in request for request in hub.requests)


def test_hub_pull_writes_the_paths_of_configurations(hub, tmp_path, capsys):
    assert main(["hub", "pull", "ditdh-xl-256-autoguidance", "--to", "models"]) == 0
    output = capsys.readouterr().out
    for path in published_files("ditdh-xl-256-autoguidance")[COLLECTION]:
        assert (tmp_path / "models" / path).read_text() == path
        assert path in output
    assert "7 files" in output
    assert main(["hub", "pull", "ditdh-xl-265"]) == 2
    assert "did you mean ditdh-xl-256" in capsys.readouterr().err
    assert main(["hub", "pull", "ditdh-xl-256", "--files", "*.pt"]) == 2
    assert "need a repository" in capsys.readouterr().err
    assert main(["hub", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*published_names(), *DIFFUSERS.values()))


def test_overrides_of_a_published_configuration():
    config = published_config("ditdh-xl-256", ["guidance.scale=1.8", "sampler.mode=SDE"])
    assert config.guidance.scale == 1.8
    assert config.sampler.mode == "SDE"
