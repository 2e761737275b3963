"""``from_pretrained`` and ``save_pretrained``: model folders, checkpoints, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_case import GOLDEN, load_case
from rae_cases import CASES, build_rae, load_rae_case
from safetensors.torch import load_file, save_file

from rae_xla import RAE, DiTDH, LightningDiT
from rae_xla.errors import UserError
from rae_xla.models.pretrained.dit_settings import infer_settings
from rae_xla.models.pretrained.latent_statistics import standard_deviation, variance_from_std

STAGE2 = GOLDEN / "e2e" / "sample_py"
DDT = ["ddt_a_published", "ddt_b_qknorm", "ddt_c_layernorm_gelu", "ddt_noposembed_nodrop"]


def equal_states(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.fixture(scope="module")
def rae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "rae"
    build_rae("dinov2").save_pretrained(folder)
    return folder


def damaged(folder: Path, tmp_path: Path, **values: object) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | values))
    return copy


# ----- autoencoders


@pytest.mark.parametrize("name", CASES)
def test_autoencoder_round_trip_is_bit_identical(name: str, tmp_path: Path) -> None:
    case, rae = load_rae_case(name), build_rae(name).eval()
    rae.save_pretrained(tmp_path / "rae")
    back = RAE.from_pretrained(tmp_path / "rae")
    assert equal_states(rae, back)
    assert not back.training
    assert [k for k, p in back.named_parameters() if p.requires_grad] == [
        k for k, p in rae.named_parameters() if p.requires_grad
    ]
    for image in ("0", "1"):
        assert torch.equal(
            back.encode(case[f"in.image{image}"]), rae.encode(case[f"in.image{image}"])
        )
        assert torch.equal(back(case[f"in.image{image}"]), rae(case[f"in.image{image}"]))
    assert back.noise_tau == rae.noise_tau


def test_statistics_of_a_folder_in_a_configuration(rae_folder: Path) -> None:
    files = {path.name for path in rae_folder.iterdir()}
    assert files == {
        "config.json", "model.safetensors", "latent_statistics.safetensors", "weights.manifest.json"
    }  # fmt: skip
    statistics = rae_folder / "latent_statistics.safetensors"
    rae = build_rae("dinov2", normalization_stat_path=str(statistics))
    assert torch.equal(rae.latent_std, build_rae("dinov2").latent_std)


def test_variance_from_std_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(4096, generator=generator) * 8 - 5
    std = standard_deviation(10**spread)
    assert torch.equal(standard_deviation(variance_from_std(std)), std)


def test_an_existing_folder_is_not_overwritten(rae_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in rae_folder.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        build_rae("mae").save_pretrained(rae_folder)
    assert {path.name: path.read_bytes() for path in rae_folder.iterdir()} == before


def test_a_failed_save_leaves_no_files(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rae_xla.models.weights.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        build_rae("mae").save_pretrained(tmp_path / "rae")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 9}, "has format 9"),
        ({"model": "VAE"}, "holds a VAE, not an autoencoder"),
        ({"settings": {}}, r"config\.json is damaged"),
    ],
)
def test_unsupported_configurations(rae_folder, tmp_path, values, message) -> None:
    with pytest.raises(UserError, match=message):
        RAE.from_pretrained(damaged(rae_folder, tmp_path, **values))


def test_mismatched_keys_are_listed(rae_folder: Path, tmp_path: Path) -> None:
    copy = damaged(rae_folder, tmp_path)
    state = load_file(copy / "model.safetensors")
    state["decoder.unknown"] = state.pop("decoder.decoder_norm.bias")
    save_file(state, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"missing decoder\.decoder_norm\.bias; unexpected decoder"):
        RAE.from_pretrained(copy)


def test_missing_folder_or_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json: give a folder that save_pretrained"):
        RAE.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        RAE.from_pretrained(tmp_path / "nothing" / "there")


# ----- diffusion transformers


@pytest.mark.parametrize("name", DDT)
def test_transformer_round_trip_is_bit_identical(name: str, tmp_path: Path) -> None:
    case = load_case(f"stage2/{name}")
    model = DiTDH(**case.meta["config"])
    model.load_state_dict(case.under("state"))
    model.save_pretrained(tmp_path / "dit")
    back = DiTDH.from_pretrained(tmp_path / "dit")
    assert equal_states(model, back)
    assert back.settings == model.settings
    out = back(case["in.x"], case["in.t"], case["in.y"])
    torch.testing.assert_close(out, case["out.forward"], atol=2e-5, rtol=1e-4)


def test_lightning_dit_round_trip_and_wrong_class(tmp_path: Path) -> None:
    case = load_case("stage2/lightningdit_b_patch2")
    model = LightningDiT(**case.meta["config"]).eval()
    model.save_pretrained(tmp_path / "dit")
    assert equal_states(model, LightningDiT.from_pretrained(tmp_path / "dit"))
    with pytest.raises(UserError, match=r"a LightningDiT: load it with LightningDiT\.from_pre"):
        DiTDH.from_pretrained(tmp_path / "dit")


@pytest.mark.parametrize("file", ["stage2_raw.pt", "stage2_train_ckpt.pt", "guide_raw.pt"])
def test_published_files_and_training_checkpoints(file: str) -> None:
    case = load_case("e2e/sample_py/golden")
    kind = "guide" if "guide" in file else "stage_2"
    model = DiTDH.from_pretrained(STAGE2 / file)
    expected = DiTDH(**case.meta[kind])
    assert model.settings == expected.settings
    prefix = "guide_state" if "guide" in file else "state"
    if prefix + ".pos_embed" in case.tensors:
        assert all(torch.equal(model.state_dict()[k], v) for k, v in case.under(prefix).items())


@pytest.mark.parametrize("name", ["DiTDH-S_in16", "DiTDH-S_in32", "DiTDH-XL_in16", "DiTDH-XL_in32"])
def test_settings_inferred_from_published_weights(name: str) -> None:
    meta = load_case(f"keymaps/{name}").meta
    with torch.device("meta"):
        state = DiTDH(**meta["config"]).state_dict()
    kind, settings = infer_settings(state, "here")
    assert kind == "DiTDH"
    assert settings | {"num_heads": list(meta["config"]["num_heads"])} == {
        **settings, **meta["config"]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lightningdit_a", "lightningdit_b_patch2"])
def test_settings_inferred_from_lightning_dit_weights(name: str) -> None:
    case = load_case(f"stage2/{name}")
    if not case.meta["config"].get("use_rope", True):
        with pytest.raises(UserError, match="number of heads is unknown"):
            infer_settings(case.under("state"), "here")
        return
    kind, settings = infer_settings(case.under("state"), "here")
    with torch.device("meta"):
        model = LightningDiT(**settings)
    assert kind == "LightningDiT"
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in case.under("state").items()
    }


def test_missing_model_weights() -> None:
    with pytest.raises(UserError, match="has no 'model' weights; it has ema"):
        DiTDH.from_pretrained(STAGE2 / "stage2_train_ckpt.pt", weights="model")


def test_an_autoencoder_folder_is_not_a_transformer(rae_folder: Path) -> None:
    with pytest.raises(UserError, match="holds a RAE, not a diffusion transformer"):
        DiTDH.from_pretrained(rae_folder)
