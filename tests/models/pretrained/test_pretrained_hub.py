"""``from_pretrained`` with a hub id or a published name, against a local fake hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers_cases import write_diffusers_case
from fake_hub import serving
from golden_case import GOLDEN, load_case
from huggingface_hub import constants
from rae_cases import build_rae, load_rae_case

from rae_xla import RAE, DiTDH
from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.models.pretrained import published
from rae_xla.models.pretrained.published import AUTOENCODERS, COLLECTION, DIFFUSERS, GENERATORS

ENCODER = GOLDEN / "rae" / "dinov2" / "encoder"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


def test_a_diffusers_repository_by_id_by_name_and_offline(hub, tmp_path, monkeypatch):
    case = write_diffusers_case("dinov2_grid16", tmp_path / "theirs")
    hub.add_folder(DIFFUSERS["rae-dinov2-s-256"], tmp_path / "theirs")
    image = case["in.image0"]
    for name in (DIFFUSERS["rae-dinov2-s-256"], "rae-dinov2-s-256"):
        latents = RAE.from_pretrained(name).encode(image)
        torch.testing.assert_close(latents, case["ref.latent0"], atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(RAE.from_pretrained("rae-dinov2-s-256").encode(image), latents)
    with pytest.raises(UserError, match="RAE-dinov2-wReg-large"):
        RAE.from_pretrained("rae-dinov2-l-256")


def test_a_transformer_by_hub_id(hub, tmp_path: Path) -> None:
    model = DiTDH.from_pretrained(GOLDEN / "e2e" / "sample_py" / "guide_raw.pt")
    model.save_pretrained(tmp_path / "dit")
    hub.add_folder("owner/dit", tmp_path / "dit")
    back = DiTDH.from_pretrained("owner/dit")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_published_names(hub, tmp_path: Path, monkeypatch) -> None:
    """Tiny models under the published names and paths."""
    decoder = {
        "decoder_hidden_size": 48, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4, "decoder_intermediate_size": 96,
    }  # fmt: skip
    tiny = replace(AUTOENCODERS["rae-dinov2-b-256"], input_size=56, grid=4)
    monkeypatch.setattr(published, "_VIT_XL", decoder)
    monkeypatch.setitem(published.AUTOENCODERS, "rae-dinov2-b-256", tiny)
    rae = build_rae(
        "dinov2", decoder_config_path=decoder, decoder_patch_size=16, pretrained_decoder_path=None
    )
    torch.save(rae.decoder.state_dict(), tmp_path / "decoder.pt")
    hub.add(tiny.encoder, {path.name: path.read_bytes() for path in ENCODER.iterdir()})
    hub.add(
        COLLECTION,
        {
            tiny.decoder: (tmp_path / "decoder.pt").read_bytes(),
            tiny.statistics: (ENCODER.parent / "stat.pt").read_bytes(),
            GENERATORS["ditdh-xl-256"].denoiser.file: b"not requested",
        },
    )
    image = load_rae_case("dinov2")["in.image0"]
    found = RAE.from_pretrained("rae-dinov2-b-256")
    assert torch.equal(found(image), rae.eval()(image))
    assert not any("stage2_model.pt" in request for request in hub.requests)
    out = str(tmp_path / "out")
    assert main(["convert", "rae-dinov2-b-256", "--to", "pretrained", "--out", out]) == 0
    assert torch.equal(RAE.from_pretrained(out)(image), found(image))


def test_a_published_transformer(hub, monkeypatch) -> None:
    settings = load_case("e2e/sample_py/golden").meta["stage_2"]
    file = GENERATORS["ditdh-s-256"].denoiser.file
    section = {"target": "DiTDH", "params": settings, "ckpt": f"models/{file}"}
    monkeypatch.setattr(published.Denoiser, "section", lambda self, grid: section)
    source = GOLDEN / "e2e" / "sample_py" / "stage2_raw.pt"
    hub.add(COLLECTION, {file: source.read_bytes()})
    model = DiTDH.from_pretrained("ditdh-s-256")
    expected = torch.load(source, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_unknown_names(hub) -> None:
    with pytest.raises(UserError, match="there is no folder ditdh-xl-265"):
        DiTDH.from_pretrained("ditdh-xl-265")
    with pytest.raises(UserError, match="owner/unknown"):
        RAE.from_pretrained("owner/unknown")
