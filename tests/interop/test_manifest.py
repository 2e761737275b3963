"""What belongs together is known by its fingerprints, and mixing it is an error."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LinearStage, one_process, save
from golden_case import GOLDEN
from rae_cases import build_rae, rae_arguments
from safetensors.torch import save_file

import rae_xla
from rae_xla import RAE, DiTDH
from rae_xla.config import ModelSpec, RunConfig
from rae_xla.errors import UserError
from rae_xla.interop.belonging import (
    check_dit_file,
    encoder_of,
    made_in_latents_of,
    write_statistics_manifest,
)
from rae_xla.interop.conversion import open_any, write_as
from rae_xla.interop.decoder import export_decoder
from rae_xla.interop.fingerprint import fingerprint
from rae_xla.interop.manifest import IGNORE, manifest_path, read_manifest
from rae_xla.models.weights import read_weight_file
from rae_xla.sample.generate import load_sampler

TINY_DIT = {
    "input_size": 4, "in_channels": 32, "hidden_size": [16, 24], "depth": [1, 1],
    "num_heads": [2, 2], "num_classes": 10,
}  # fmt: skip


def other_encoder(tmp_path: Path) -> dict[str, object]:
    """The arguments of the same autoencoder with another encoder."""
    folder = tmp_path / "other_encoder"
    shutil.copytree(GOLDEN / "rae" / "dinov2" / "encoder", folder)
    weights = read_weight_file(folder / "model.safetensors", "weights")
    weights["embeddings.cls_token"] += 1
    save_file(weights, folder / "model.safetensors")
    arguments = rae_arguments("dinov2")
    return arguments | {"encoder_config_path": str(folder), "encoder_params": {}}


# ----- fingerprints


def test_the_same_weights_have_one_fingerprint_in_any_file(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "rae/dinov2/decoder.pt", weights_only=True)
    save_file(state, tmp_path / "decoder.safetensors")
    stored = read_weight_file(tmp_path / "decoder.safetensors", "decoder")
    turned = dict(reversed(list(state.items())))
    assert fingerprint(state) == fingerprint(stored) == fingerprint(turned)


@pytest.mark.parametrize("change", ["value", "name", "shape", "precision"])
def test_other_weights_have_another(change: str) -> None:
    weight = torch.randn(4, 6)
    changed = {
        "value": {"a": weight.nextafter(weight + 1)},
        "name": {"b": weight},
        "shape": {"a": weight.reshape(6, 4)},
        "precision": {"a": weight.bfloat16()},
    }
    assert fingerprint({"a": weight}) != fingerprint(changed[change])


def test_the_fingerprint_is_the_documented_one() -> None:
    """Other versions and other programs must find the same."""
    found = fingerprint({"b": torch.arange(3), "a": torch.tensor([[1.0, -2.0]])})
    expected = hashlib.sha256()
    for name, shape, values in (
        ("a", "(1, 2)", struct.pack("<2f", 1, -2)),
        ("b", "(3,)", struct.pack("<3q", 0, 1, 2)),
    ):
        expected.update(f"{name}\0{shape}\0".encode() + hashlib.sha256(values).digest())
    assert found == expected.hexdigest()


# ----- folders


def test_a_replaced_part_is_found(tmp_path: Path) -> None:
    build_rae("dinov2").save_pretrained(tmp_path / "rae")
    RAE(**other_encoder(tmp_path)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "rae" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"a part was replaced: its manifest was written for the enc"
    ):
        RAE.from_pretrained(tmp_path / "rae")
    assert RAE.from_pretrained(tmp_path / "rae", check=False).latent_size == (32, 4, 4)


def test_a_transformer_with_another_autoencoder_is_refused(tmp_path: Path, monkeypatch) -> None:
    rae = build_rae("dinov2")
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    other = RAE(**other_encoder(tmp_path))
    assert DiTDH.from_pretrained(tmp_path / "dit", rae=rae).settings["in_channels"] == 32
    message = (
        r"dit: diffusion transformer made with the encoder \w{12} .* used with the encoder \w{12}"
    )
    with pytest.raises(UserError, match=message):
        DiTDH.from_pretrained(tmp_path / "dit", rae=other)
    with pytest.raises(UserError, match=message):
        check_dit_file(tmp_path / "dit", other)
    monkeypatch.setenv(IGNORE, "1")
    check_dit_file(tmp_path / "dit", other)
    DiTDH.from_pretrained(tmp_path / "dit", rae=other)


def test_another_decoder_of_the_encoder_is_no_mixture(tmp_path: Path) -> None:
    rae = build_rae("dinov2")
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    check_dit_file(tmp_path / "dit", build_rae("dinov2", pretrained_decoder_path=None))


def test_other_statistics_are_a_mixture(tmp_path: Path) -> None:
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=build_rae("dinov2"))
    torch.save({"var": torch.ones(32, 4, 4)}, tmp_path / "stat.pt")
    other = build_rae("dinov2", normalization_stat_path=str(tmp_path / "stat.pt"))
    with pytest.raises(UserError, match=r"with the latent statistics .* used with the latent stat"):
        check_dit_file(tmp_path / "dit", other)


def test_missing_statistics_are_a_mixture_and_so_are_needless_ones(tmp_path: Path) -> None:
    rae, bare = build_rae("dinov2"), build_rae("dinov2", normalization_stat_path=None)
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=rae)
    with pytest.raises(UserError, match=r"the autoencoder has none: give it them .* --stats"):
        check_dit_file(tmp_path / "dit", bare)
    with pytest.raises(UserError, match="the autoencoder has none"):
        DiTDH.from_pretrained(tmp_path / "dit", rae=bare)
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "plain", rae=bare)
    DiTDH.from_pretrained(tmp_path / "plain", rae=bare)
    with pytest.raises(UserError, match="made without latent statistics cannot be used"):
        DiTDH.from_pretrained(tmp_path / "plain", rae=rae)


def test_a_training_checkpoint_knows_what_it_was_trained_with(tmp_path: Path) -> None:
    class Stage(LinearStage):
        ties = made_in_latents_of(build_rae("dinov2"), rae_arguments("dinov2"))

    checkpoint = save(tmp_path / "checkpoints", 10, Stage())
    other = build_rae("dinov2", **other_encoder(tmp_path))
    for place in (tmp_path, checkpoint.path):
        check_dit_file(place, build_rae("dinov2"))
        with pytest.raises(UserError, match=r"with the encoder \w+ \(.*\) cannot be used with"):
            check_dit_file(place, other)


def test_sampling_refuses_the_mixture(tmp_path: Path) -> None:
    DiTDH(**TINY_DIT).save_pretrained(tmp_path / "dit", rae=build_rae("dinov2"))
    config = RunConfig(
        stage_1=ModelSpec("stage1.RAE", other_encoder(tmp_path)),
        stage_2=ModelSpec("DiTDH", TINY_DIT, ckpt=str(tmp_path / "dit")),
    )
    with pytest.raises(UserError, match="cannot be used with the encoder"):
        load_sampler(config, one_process())
    own = replace(config, stage_1=ModelSpec("stage1.RAE", rae_arguments("dinov2")))
    load_sampler(own, one_process())


# ----- files that a configuration names


@pytest.fixture
def published(tmp_path: Path) -> Path:
    build_rae("dinov2").save_pretrained(tmp_path / "rae")
    write_as(open_any(tmp_path / "rae"), "published", tmp_path / "published")
    return tmp_path / "published"


@pytest.mark.parametrize(
    ("kind", "key", "file"),
    [
        ("decoder", "pretrained_decoder_path", "decoder.pt"),
        ("statistics", "normalization_stat_path", "stat.pt"),
    ],
)
def test_parts_of_another_encoder_are_refused(published, tmp_path, kind, key, file) -> None:
    own = rae_arguments("dinov2") | {key: str(published / file)}
    assert rae_xla.instantiate({"target": "stage1.RAE", "params": own}).grid == 4
    mixed = other_encoder(tmp_path) | {key: str(published / file)}
    with pytest.raises(UserError) as caught:
        rae_xla.instantiate({"target": "stage1.RAE", "params": mixed})
    message = str(caught.value)
    assert message.startswith(str(published / file))
    assert f"{kind} made with the encoder" in message
    assert str(tmp_path / "other_encoder") in message
    assert IGNORE in message


def test_statistics_know_the_encoder_they_were_measured_with(tmp_path: Path) -> None:
    mean, var = torch.randn(32, 4, 4), torch.rand(32, 4, 4)
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    encoder = encoder_of(build_rae("dinov2"), "the encoder of the measurement")
    write_statistics_manifest(tmp_path / "stat.pt", mean, var, encoder)
    own = rae_arguments("dinov2") | {"normalization_stat_path": str(tmp_path / "stat.pt")}
    rae_xla.instantiate({"target": "stage1.RAE", "params": own})
    mixed = other_encoder(tmp_path) | {"normalization_stat_path": str(tmp_path / "stat.pt")}
    with pytest.raises(UserError, match=r"the encoder \w{12} \(the encoder of the measurement\)"):
        rae_xla.instantiate({"target": "stage1.RAE", "params": mixed})
    torch.save({"mean": mean, "var": var + 1}, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=r"stat\.pt: a part was replaced: .* here is"):
        rae_xla.instantiate({"target": "stage1.RAE", "params": own})


def test_an_exported_decoder_knows_its_encoder(tmp_path: Path) -> None:
    rae = build_rae("dinov2")
    torch.save({"step": 3, "model": rae.state_dict(), "ema": rae.state_dict()}, tmp_path / "c.pt")
    export_decoder(tmp_path / "c.pt", tmp_path / "decoder.pt")
    manifest = read_manifest(tmp_path / "decoder.pt")
    assert manifest.made_with["decoder"]["encoder"].sha256 == fingerprint(rae.encoder.state_dict())
    torch.save(rae.decoder.state_dict(prefix="decoder."), tmp_path / "bare.pt")
    export_decoder(
        tmp_path / "bare.pt", tmp_path / "decoder.pt"
    )  # tied to none: not to the old one
    assert read_manifest(tmp_path / "decoder.pt").made_with == {}


def test_statistics_of_another_encoder_are_not_given_to_an_autoencoder(published, tmp_path) -> None:
    RAE(**other_encoder(tmp_path)).save_pretrained(tmp_path / "other")
    statistics = published / "stat.pt"
    with pytest.raises(UserError, match="statistics made with the encoder"):
        open_any(tmp_path / "other", statistics=statistics)
    assert open_any(tmp_path / "other", statistics=statistics, check=False).part == "rae"
    assert open_any(tmp_path / "rae", statistics=statistics).content is not None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1, "parts": {"a": 3}}'])
def test_a_damaged_manifest(tmp_path: Path, content: str) -> None:
    weights = tmp_path / "decoder.pt"
    manifest_path(weights).write_text(content)
    with pytest.raises(UserError, match=r"decoder\.pt\.manifest\.json is damaged"):
        read_manifest(weights)


def test_a_manifest_of_a_later_version(tmp_path: Path) -> None:
    manifest_path(tmp_path / "d.pt").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="is of format 2; this version reads 1"):
        read_manifest(tmp_path / "d.pt")
