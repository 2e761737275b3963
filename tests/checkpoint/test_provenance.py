"""Provenance: parts that were not trained with each other are an error wherever they meet."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LinearTask, one_process, save
from golden_case import GOLDEN
from rae_cases import build_rae, rae_arguments
from safetensors.torch import save_file

import rae_xla
from rae_xla import RAE, DiTDH
from rae_xla.checkpoint.provenance import (
    check_dit_file,
    encoder_part,
    latent_provenance,
    write_statistics_manifest,
)
from rae_xla.config import ModelSpec, RunConfig
from rae_xla.errors import UserError
from rae_xla.interop.layouts import export_decoder, write_layout
from rae_xla.interop.model_source import open_model_source
from rae_xla.models.pretrained.fingerprint import fingerprint
from rae_xla.models.pretrained.manifest import IGNORE, read_weights_manifest
from rae_xla.models.weights import read_weight_file
from rae_xla.sample.sampler import load_sampler

TINY_DIT = {
    "input_size": 4, "in_channels": 32, "hidden_size": [16, 24], "depth": [1, 1],
    "num_heads": [2, 2], "num_classes": 10,
}  # fmt: skip


def other_encoder(tmp_path: Path) -> dict[str, object]:
    """Constructor arguments of the same autoencoder with another encoder."""
    folder = tmp_path / "other_encoder"
    shutil.copytree(GOLDEN / "rae" / "dinov2" / "encoder", folder)
    weights = read_weight_file(folder / "model.safetensors", "weights")
    weights["embeddings.cls_token"] += 1
    save_file(weights, folder / "model.safetensors")
    arguments = rae_arguments("dinov2")
    return arguments | {"encoder_config_path": str(folder), "encoder_params": {}}


def test_a_replaced_part_is_an_error(tmp_path: Path) -> None:
    build_rae("dinov2").save_pretrained(tmp_path / "rae")
    RAE(**other_encoder(tmp_path)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "rae" / "model.safetensors")
    with pytest.raises(UserError, match="a part was replaced"):
        RAE.from_pretrained(tmp_path / "rae")
    assert RAE.from_pretrained(tmp_path / "rae", check=False).latent_size == (32, 4, 4)


def test_a_transformer_with_another_autoencoder_is_an_error(tmp_path: Path, monkeypatch) -> None:
    rae = build_rae("dinov2")
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    other = RAE(**other_encoder(tmp_path))
    assert DiTDH.from_pretrained(tmp_path / "dit", rae=rae).settings["in_channels"] == 32
    message = r"dit: diffusion transformer .* the encoder \w{12} .* the encoder \w{12}"
    with pytest.raises(UserError, match=message):
        DiTDH.from_pretrained(tmp_path / "dit", rae=other)
    with pytest.raises(UserError, match=message):
        check_dit_file(tmp_path / "dit", other)
    monkeypatch.setenv(IGNORE, "1")
    check_dit_file(tmp_path / "dit", other)
    DiTDH.from_pretrained(tmp_path / "dit", rae=other)


def test_another_decoder_of_the_encoder_is_accepted(tmp_path: Path) -> None:
    rae = build_rae("dinov2")
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    check_dit_file(tmp_path / "dit", build_rae("dinov2", pretrained_decoder_path=None))


def test_other_statistics_are_an_error(tmp_path: Path) -> None:
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=build_rae("dinov2"))
    torch.save({"var": torch.ones(32, 4, 4)}, tmp_path / "stat.pt")
    other = build_rae("dinov2", normalization_stat_path=str(tmp_path / "stat.pt"))
    with pytest.raises(UserError, match=r"latent statistics .* latent statistics"):
        check_dit_file(tmp_path / "dit", other)


def test_missing_and_extra_statistics_are_errors(tmp_path: Path) -> None:
    rae, bare = build_rae("dinov2"), build_rae("dinov2", normalization_stat_path=None)
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    with pytest.raises(UserError, match=r"the autoencoder has none: .* --stats"):
        check_dit_file(tmp_path / "dit", bare)
    with pytest.raises(UserError, match="the autoencoder has none"):
        DiTDH.from_pretrained(tmp_path / "dit", rae=bare)
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "plain", rae=bare)
    DiTDH.from_pretrained(tmp_path / "plain", rae=bare)
    with pytest.raises(UserError, match="without latent statistics"):
        DiTDH.from_pretrained(tmp_path / "plain", rae=rae)


def test_a_training_checkpoint_records_its_autoencoder(tmp_path: Path) -> None:
    class Task(LinearTask):
        provenance = latent_provenance(build_rae("dinov2"), rae_arguments("dinov2"))

    checkpoint = save(tmp_path / "checkpoints", 10, Task())
    other = build_rae("dinov2", **other_encoder(tmp_path))
    for place in (tmp_path, checkpoint.path):
        check_dit_file(place, build_rae("dinov2"))
        with pytest.raises(UserError, match=r"the encoder \w+ \(.*\) .* the encoder"):
            check_dit_file(place, other)


def test_sampling_checks_the_provenance(tmp_path: Path) -> None:
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=build_rae("dinov2"))
    config = RunConfig(
        stage_1=ModelSpec("stage1.RAE", other_encoder(tmp_path)),
        stage_2=ModelSpec("DiTDH", TINY_DIT, ckpt=str(tmp_path / "dit")),
    )
    with pytest.raises(UserError, match="the encoder"):
        load_sampler(config, one_process())
    own = replace(config, stage_1=ModelSpec("stage1.RAE", rae_arguments("dinov2")))
    load_sampler(own, one_process())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    build_rae("dinov2").save_pretrained(tmp_path / "rae")
    write_layout(open_model_source(tmp_path / "rae"), "published", tmp_path / "published")
    return tmp_path / "published"


@pytest.mark.parametrize(
    ("kind", "key", "file"),
    [
        ("decoder", "pretrained_decoder_path", "decoder.pt"),
        ("statistics", "normalization_stat_path", "stat.pt"),
    ],
)
def test_parts_of_another_encoder_are_errors(published, tmp_path, kind, key, file) -> None:
    own = rae_arguments("dinov2") | {key: str(published / file)}
    assert rae_xla.instantiate({"target": "stage1.RAE", "params": own}).grid == 4
    mixed = other_encoder(tmp_path) | {key: str(published / file)}
    with pytest.raises(UserError) as caught:
        rae_xla.instantiate({"target": "stage1.RAE", "params": mixed})
    message = str(caught.value)
    assert message.startswith(str(published / file))
    assert kind in message
    assert str(tmp_path / "other_encoder") in message
    assert IGNORE in message


def test_statistics_record_their_encoder(tmp_path: Path) -> None:
    mean, var = torch.randn(32, 4, 4), torch.rand(32, 4, 4)
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    encoder = encoder_part(build_rae("dinov2"), "the encoder of the measurement")
    write_statistics_manifest(tmp_path / "stat.pt", mean, var, encoder)
    own = rae_arguments("dinov2") | {"normalization_stat_path": str(tmp_path / "stat.pt")}
    rae_xla.instantiate({"target": "stage1.RAE", "params": own})
    mixed = other_encoder(tmp_path) | {"normalization_stat_path": str(tmp_path / "stat.pt")}
    with pytest.raises(UserError, match=r"the encoder \w{12} \(the encoder of the measurement\)"):
        rae_xla.instantiate({"target": "stage1.RAE", "params": mixed})
    torch.save({"mean": mean, "var": var + 1}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=r"stat\.pt: a part was replaced"):
        rae_xla.instantiate({"target": "stage1.RAE", "params": own})


def test_an_exported_decoder_records_its_encoder(tmp_path: Path) -> None:
    rae = build_rae("dinov2")
    torch.save({"step": 3, "model": rae.state_dict(), "ema": rae.state_dict()}, tmp_path / "c.pt")
    export_decoder(tmp_path / "c.pt", tmp_path / "decoder.pt")
    manifest = read_weights_manifest(tmp_path / "decoder.pt")
    assert manifest.made_with["decoder"]["encoder"].sha256 == fingerprint(rae.encoder.state_dict())
    torch.save(rae.decoder.state_dict(prefix="decoder."), tmp_path / "bare.pt")
    export_decoder(tmp_path / "bare.pt", tmp_path / "decoder.pt")  # replaces the manifest
    assert read_weights_manifest(tmp_path / "decoder.pt").made_with == {}


def test_statistics_of_another_encoder_are_an_error(published, tmp_path) -> None:
    RAE(**other_encoder(tmp_path)).save_pretrained(tmp_path / "other")
    statistics = published / "stat.pt"
    with pytest.raises(UserError, match=r"statistics .* the encoder"):
        open_model_source(tmp_path / "other", statistics=statistics)
    assert open_model_source(tmp_path / "other", statistics=statistics, check=False).part == "rae"
    assert open_model_source(tmp_path / "rae", statistics=statistics).components is not None
