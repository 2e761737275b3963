"""Folders of diffusers' AutoencoderRAE: recorded ones and those of the installed diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers_cases import CASES, write_diffusers_case
from golden_case import load_case
from rae_cases import build_rae as build_rae_case
from safetensors.torch import load_file, save_file

from rae_xla import RAE
from rae_xla.errors import UserError
from rae_xla.interop.layouts import write_layout
from rae_xla.interop.model_source import open_model_source
from rae_xla.models.embeddings import sincos_positions
from rae_xla.models.pretrained.components import (
    RAEComponents,
    build_meta_encoder_and_decoder,
    build_rae,
    rae_to_components,
)
from rae_xla.models.pretrained.diffusers_folder import (
    diffusers_positions,
    rae_settings,
    read_diffusers,
    write_diffusers,
)
from rae_xla.models.pretrained.diffusers_keys import DIFFUSERS_ONLY, POSITIONS, diffusers_name

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=CASES)
def recorded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers") / request.param
    return write_diffusers_case(request.param, folder), folder


def images_of(case) -> list[str]:
    return [key[-1] for key in case.tensors if key.startswith("in.image")]


# ----- the recorded numbers


def test_default_matches_the_published_code(recorded) -> None:
    case, folder = recorded
    rae = RAE.from_pretrained(folder)
    for image in images_of(case):
        assert_close(rae.encode(case[f"in.image{image}"]), case[f"ref.latent{image}"])
        assert_close(rae.decode(case[f"ref.latent{image}"]), case[f"ref.recon{image}"])


def test_as_diffusers_matches_diffusers(recorded) -> None:
    case, folder = recorded
    rae = RAE.from_pretrained(folder, as_diffusers=True)
    for image in images_of(case):
        assert_close(rae.encode(case[f"in.image{image}"]), case[f"out.latent{image}"])
        assert_close(rae.decode(case[f"out.latent{image}"]), case[f"out.recon{image}"])


def test_position_tables(recorded) -> None:
    case, _ = recorded
    theirs, ours = (
        case["const.diffusers_decoder_pos_embed"],
        case["const.reference_decoder_pos_embed"],
    )
    grid, width = int((theirs.shape[1] - 1) ** 0.5), theirs.shape[2]
    assert torch.equal(diffusers_positions(width, grid)[None], theirs)
    torch.testing.assert_close(sincos_positions(width, grid, cls_token=True)[None], ours)
    assert torch.equal(theirs, ours) == (grid == 16)


def test_keys_match_the_recorded_ones(recorded) -> None:
    case, folder = recorded
    kind = json.loads((folder / "config.json").read_text())["encoder_type"]
    decoder = case.meta["decoder_key_map_bytetriper_to_diffusers"]
    for ours, theirs in decoder.items():
        if ours != "decoder_pos_embed":
            assert diffusers_name(f"decoder.{ours}", kind, 4) == theirs
    for ours, theirs in case.meta["encoder_key_map_bytetriper_to_diffusers"].items():
        assert diffusers_name(ours, kind, 4) == theirs


def test_keys_of_the_published_repository() -> None:
    meta = load_case("keymaps/diffusers_AutoencoderRAE_dinov2_ViTXL").meta
    ours = load_case("keymaps/RAE_DINOv2-B_decXL").meta["keys"]
    renamed = {diffusers_name(k, "dinov2", 4): v[0] for k, v in ours.items() if k != POSITIONS}
    theirs = {k: v[0] for k, v in meta["keys"].items() if k not in DIFFUSERS_ONLY}
    assert renamed == theirs


# ----- round trips


@pytest.mark.parametrize("transformers", [4, 5])
def test_round_trip_is_bit_identical(recorded, tmp_path: Path, transformers: int) -> None:
    case, folder = recorded
    rae = RAE.from_pretrained(folder)
    out = tmp_path / "out"
    write_layout(
        open_model_source(folder), "diffusers", out, transformers=transformers, other_positions=True
    )
    back = RAE.from_pretrained(out)
    assert rae.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in rae.state_dict().items())
    image = case["in.image0"]
    assert torch.equal(back.encode(image), rae.encode(image))
    assert torch.equal(back(image), rae(image))


def test_the_second_epsilon_is_subtracted_exactly(tmp_path: Path) -> None:
    components = read_diffusers(_recorded_folder("dinov2_grid16", tmp_path / "in"))
    write_diffusers(components, _empty(tmp_path / "out"))
    theirs = load_file(tmp_path / "out" / WEIGHTS)["_latents_std"]
    assert torch.equal(theirs + 1e-5, components.latent_std)
    assert not torch.equal(theirs, components.latent_std)


# ----- the installed diffusers


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def installed_release() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])


@pytest.mark.slow
def test_the_installed_diffusers_reads_our_folders(diffusers, tmp_path: Path) -> None:
    case = write_diffusers_case("dinov2_grid16", tmp_path / "in")
    rae = RAE.from_pretrained(tmp_path / "in")
    write_layout(
        open_model_source(tmp_path / "in"),
        "diffusers",
        tmp_path / "out",
        transformers=installed_release(),
    )
    theirs = diffusers.AutoencoderRAE.from_pretrained(tmp_path / "out")
    state = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())
    with torch.no_grad():
        latents = theirs.encode(case["in.image0"]).latent
        torch.testing.assert_close(latents, rae.encode(case["in.image0"]), atol=1e-5, rtol=1e-5)
        decoded = theirs.decode(latents).sample
        torch.testing.assert_close(decoded, rae.decode(latents), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_reading_folders_of_the_installed_diffusers(diffusers, tmp_path: Path, name: str) -> None:
    case = write_diffusers_case(name, tmp_path / "in")
    renamed = tmp_path / "renamed"
    write_layout(
        open_model_source(tmp_path / "in"), "diffusers", renamed,
        transformers=installed_release(), other_positions=True,
    )  # fmt: skip
    theirs = diffusers.AutoencoderRAE.from_pretrained(renamed)
    theirs.save_pretrained(tmp_path / "theirs")
    rae = RAE.from_pretrained(tmp_path / "theirs", as_diffusers=True)
    image = case["in.image0"]
    with torch.no_grad():
        latents = theirs.encode(image).latent
        torch.testing.assert_close(rae.encode(image), latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            rae.decode(latents), theirs.decode(latents).sample, atol=1e-5, rtol=1e-5
        )


# ----- errors


def test_other_grids_are_refused_by_default(tmp_path: Path) -> None:
    components = read_diffusers(_recorded_folder("dinov2", tmp_path / "in"))
    with pytest.raises(UserError, match=r"different images .* grid of 4 x 4 .* up to 1\.83"):
        write_diffusers(components, _empty(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="different images"):
        write_layout(open_model_source(tmp_path / "in"), "diffusers", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []
    as_diffusers = read_diffusers(tmp_path / "in", as_diffusers=True)
    write_diffusers(as_diffusers, tmp_path / "out")  # with diffusers' own table


def test_unsupported_encoders_are_refused(tmp_path: Path) -> None:
    components = rae_to_components(build_rae_case("dinov2"))
    with pytest.raises(UserError, match=r"cannot represent .*num_attention_heads is 4"):
        write_diffusers(components, _empty(tmp_path / "out"), other_positions=True)
    affine = rae_to_components(build_rae_case("dinov2_tokens_affine"))
    with pytest.raises(UserError, match="last affine map"):
        write_diffusers(affine, tmp_path / "out", other_positions=True)
    siglip = rae_to_components(build_rae_case("siglip2"))
    with pytest.raises(UserError, match="cannot build a SigLIP2 encoder with transformers 5"):
        write_diffusers(siglip, tmp_path / "out", transformers=5, other_positions=True)


def test_mismatched_keys_are_listed(tmp_path: Path) -> None:
    folder = _recorded_folder("mae", tmp_path / "in")
    state = load_file(folder / WEIGHTS)
    state["decoder.unknown"] = state.pop("decoder.decoder_norm.bias")
    del state["encoder.embeddings.cls_token"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(UserError) as caught:
        RAE.from_pretrained(folder)
    assert "missing encoder.embeddings.cls_token, decoder.decoder_norm.bias" in str(caught.value)
    assert "unexpected decoder.unknown" in str(caught.value)


def test_damaged_diffusers_folders(tmp_path: Path) -> None:
    folder = _recorded_folder("mae", tmp_path / "in")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"encoder_type": "clip"}))
    with pytest.raises(UserError, match=r"config\.json .*AutoencoderRAE: KeyError 'clip'"):
        RAE.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        RAE.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no weights"):
        RAE.from_pretrained(folder)


def test_the_scaling_factor_is_applied_to_the_statistics(tmp_path: Path) -> None:
    case = write_diffusers_case("mae", tmp_path / "in")
    plain = RAE.from_pretrained(tmp_path / "in")
    values = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(values | {"scaling_factor": 0.5}))
    scaled = RAE.from_pretrained(tmp_path / "in")
    assert_close(scaled.encode(case["in.image0"]), plain.encode(case["in.image0"]) * 0.5)
    assert_close(scaled(case["in.image0"]), plain(case["in.image0"]))


def test_siglip2_round_trip(tmp_path: Path) -> None:
    """No recorded folder has this encoder; the keys are those of the published repository."""
    _recorded_folder("mae", tmp_path / "mae")
    values = json.loads((tmp_path / "mae" / "config.json").read_text())
    settings = rae_settings(values | {"encoder_type": "siglip2"}, tmp_path)
    torch.manual_seed(0)
    encoder, decoder = build_meta_encoder_and_decoder(settings)
    shapes = encoder.state_dict(prefix="encoder.") | decoder.state_dict(prefix="decoder.")
    state = {name: torch.randn(value.shape) * 0.1 for name, value in shapes.items()}
    state[POSITIONS] = sincos_positions(32, 4, cls_token=True)[None]
    components = RAEComponents(settings, state, None, torch.rand(64, 4, 4) + 0.5)
    write_diffusers(components, _empty(tmp_path / "out"), other_positions=True)
    written = load_file(tmp_path / "out" / WEIGHTS).keys()
    query = "encoder.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    assert {query, "encoder.vision_model.head.probe"} < written
    back = build_rae(RAE, read_diffusers(tmp_path / "out", second_eps_removed=True), "out")
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())
    assert torch.equal(back.latent_std, components.latent_std)
    assert type(back.encoder).__name__ == "SigLIP2Encoder"


def _recorded_folder(name: str, folder: Path) -> Path:
    write_diffusers_case(name, folder)
    return folder


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
