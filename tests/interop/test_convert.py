"""``rae-xla convert``: every source, every layout, and the errors."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_cases import LinearTask, save
from diffusers_cases import write_diffusers_case
from gan_cases import build_discriminator
from golden_case import GOLDEN, load_case
from rae_cases import CASES, build_rae, load_rae_case, rae_arguments
from safetensors.torch import load_file

import rae_xla
from rae_xla import RAE, DiTDH
from rae_xla.cli.main import main
from rae_xla.interop.layouts import export_decoder
from rae_xla.models.pretrained.latent_statistics import standard_deviation
from rae_xla.models.pretrained.manifest import read_weights_manifest
from rae_xla.sample.model_lookup import resolve_model

pytestmark = pytest.mark.slow

STAGE2 = GOLDEN / "e2e" / "sample_py"
DECODER = GOLDEN / "rae" / "dinov2" / "decoder.pt"


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def zeros_like_recorded(layout: object) -> object:
    """Return a checkpoint of zeros with the recorded names, shapes and types."""
    if isinstance(layout, dict):
        return {k: zeros_like_recorded(v) for k, v in layout.items()}
    if isinstance(layout, list):
        return [zeros_like_recorded(v) for v in layout if v != "..."]
    kind, _, rest = str(layout).partition("=")
    if kind.startswith("tensor["):
        shape, dtype = kind.removeprefix("tensor").split(":")
        return torch.zeros(yaml.safe_load(shape), dtype=getattr(torch, dtype))
    return yaml.safe_load(rest)


def run_yaml(folder: Path, **sections: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def stage_1(name: str = "dinov2", **changes: object) -> dict[str, object]:
    return {"target": "stage1.RAE", "params": rae_arguments(name, **changes)}


def stage1_checkpoint(path: Path, rae: torch.nn.Module, config: object = None) -> Path:
    averaged = {k: v + 1 if k.startswith("decoder.") else v for k, v in rae.state_dict().items()}
    content = {"step": 7, "epoch": 1, "model": rae.state_dict(), "ema": averaged}
    content |= {"disc": build_discriminator("dinodisc_a").state_dict()}
    torch.save(content if config is None else content | {"config": config}, path)
    return path


# ----- single parts


def test_decoder_round_trip(tmp_path: Path, capsys) -> None:
    assert convert(DECODER, "--to", "safetensors", "--out", tmp_path / "d.safetensors") == 0
    assert convert(tmp_path / "d.safetensors", "--to", "published", "--out", tmp_path / "d.pt") == 0
    assert equal(load(tmp_path / "d.pt"), load(DECODER))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{DECODER}: state dict: a decoder, 40 tensors"
    assert len(lines) == 4


def test_statistics_to_safetensors(tmp_path: Path) -> None:
    source = GOLDEN / "rae" / "dinov2" / "stat.pt"
    assert convert(source, "--to", "safetensors", "--out", tmp_path / "s.safetensors") == 0
    assert equal(load_file(tmp_path / "s.safetensors"), load(source))


@pytest.mark.parametrize("name", ["stage2_raw.pt", "guide_raw.pt", "stage2_train_ckpt.pt"])
def test_transformer_round_trip(tmp_path: Path, name: str) -> None:
    assert convert(STAGE2 / name, "--to", "pretrained", "--out", tmp_path / "dit") == 0
    assert convert(tmp_path / "dit", "--to", "published", "--out", tmp_path / "dit.pt") == 0
    assert (
        convert(tmp_path / "dit.pt", "--to", "safetensors", "--out", tmp_path / "d.safetensors")
        == 0
    )
    content = load(STAGE2 / name)
    expected = content.get("ema", content)
    assert equal(load(tmp_path / "dit.pt"), expected)
    assert equal(load_file(tmp_path / "d.safetensors"), expected)
    spec = {"target": "stage2.models.DDT.DiTwDDTHead", "ckpt": str(tmp_path / "dit")}
    params = DiTDH.from_pretrained(tmp_path / "dit").settings
    assert equal(rae_xla.instantiate({**spec, "params": params}).state_dict(), expected)


def test_parts_of_a_stage1_checkpoint(tmp_path: Path, capsys) -> None:
    rae = build_rae("dinov2")
    source = stage1_checkpoint(tmp_path / "c.pt", rae)
    for part, out in (("decoder", "d.pt"), ("discriminator", "disc.pt"), ("rae", "rae.pt")):
        assert convert(source, "--part", part, "--to", "published", "--out", tmp_path / out) == 0
    averaged = {k: v + 1 for k, v in rae.decoder.state_dict().items()}
    assert equal(load(tmp_path / "d.pt"), averaged)
    assert equal(load(tmp_path / "disc.pt"), build_discriminator("dinodisc_a").state_dict())
    assert load(tmp_path / "rae.pt").keys() == rae.state_dict().keys()
    assert "training checkpoint of step 7, ema weights" in capsys.readouterr().out
    arguments = (source, "--part", "decoder", "--weights", "model", "--to", "published")
    assert convert(*arguments, "--out", tmp_path / "d.pt") == 0
    assert equal(load(tmp_path / "d.pt"), rae.decoder.state_dict())


def test_checkpoints_of_the_published_code(tmp_path: Path, capsys) -> None:
    for run, part in (("train_stage1_run", "decoder"), ("train_stage2_run", "stage2")):
        layout = load_case(f"e2e/{run}").meta["checkpoint_layout"]
        torch.save(zeros_like_recorded(layout), tmp_path / f"{run}.pt")
        out = tmp_path / f"{run}.safetensors"
        assert (
            convert(tmp_path / f"{run}.pt", "--part", part, "--to", "safetensors", "--out", out)
            == 0
        )
        assert f"training checkpoint of step {layout['step'][4:]}" in capsys.readouterr().out
        names = {
            k.removeprefix("decoder.") for k in layout["ema"] if part != "decoder" or k[:2] == "de"
        }
        assert load_file(out).keys() == names
    recorded = load_case("e2e/train_stage1_run").meta["extract_decoder"]["keys"]
    assert load_file(tmp_path / "train_stage1_run.safetensors").keys() == recorded.keys()


# ----- complete autoencoders


@pytest.mark.parametrize("name", CASES)
def test_published_files_round_trip(tmp_path: Path, name: str) -> None:
    case, rae = load_rae_case(name), build_rae(name).eval()
    rae.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", "--to", "published", "--out", tmp_path / "published") == 0
    section = tmp_path / "published" / "stage_1.yaml"
    assert convert(section, "--to", "pretrained", "--out", tmp_path / "back") == 0
    back = RAE.from_pretrained(tmp_path / "back")
    assert equal(back.state_dict(), rae.state_dict())
    image = case["in.image1"]
    torch.testing.assert_close(back.encode(image), rae.encode(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(back(image), rae(image), atol=1e-5, rtol=0)
    assert rae.latent_std is None or torch.equal(back.latent_std, rae.latent_std)
    assert read_weights_manifest(tmp_path / "back").parts["encoder"].sha256 == (
        read_weights_manifest(tmp_path / "ours").parts["encoder"].sha256
    )


def test_diffusers_round_trip(tmp_path: Path) -> None:
    case = write_diffusers_case("dinov2_grid16", tmp_path / "theirs")
    assert convert(tmp_path / "theirs", "--to", "pretrained", "--out", tmp_path / "ours") == 0
    assert convert(tmp_path / "ours", "--to", "diffusers", "--out", tmp_path / "diffusers") == 0
    rae = RAE.from_pretrained(tmp_path / "ours")
    back = RAE.from_pretrained(tmp_path / "diffusers")
    assert equal(back.state_dict(), rae.state_dict())
    assert torch.equal(back.latent_std, rae.latent_std)
    image = case["in.image0"]
    assert torch.equal(back.encode(image), rae.encode(image))
    assert torch.equal(back(image), rae(image))
    written = load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors")
    recorded = {k: v for k, v in case.under("state").items() if k != "_latents_std"}
    assert equal({k: v for k, v in written.items() if k != "_latents_std"}, recorded)


def test_statistics_of_a_diffusers_folder(tmp_path: Path) -> None:
    write_diffusers_case("dinov2", tmp_path / "theirs")
    arguments = (tmp_path / "theirs", "--part", "stats", "--to", "published")
    assert convert(*arguments, "--out", tmp_path / "stat.pt") == 0
    rae = RAE.from_pretrained(tmp_path / "theirs")
    assert torch.equal(standard_deviation(load(tmp_path / "stat.pt")["var"]), rae.latent_std)
    assert "encoder" in read_weights_manifest(tmp_path / "stat.pt").made_with["statistics"]


def test_a_stage1_checkpoint_to_a_folder(tmp_path: Path) -> None:
    rae = build_rae("dinov2", normalization_stat_path=None)
    plain = {"stage_1": stage_1(normalization_stat_path=None)}
    bare = stage1_checkpoint(tmp_path / "bare.pt", rae)
    own = stage1_checkpoint(tmp_path / "own.pt", rae, plain)
    statistics = GOLDEN / "rae" / "dinov2" / "stat.pt"
    for source, options in (
        (bare, ("--config", run_yaml(tmp_path, **plain))),
        (own, ()),
        (own, ("--stats", statistics)),
    ):
        out = tmp_path / f"{source.stem}{len(options)}"
        out = out.with_name(out.name + ("s" if "--stats" in options else ""))
        assert convert(source, "--to", "pretrained", "--out", out, *options) == 0
        back = RAE.from_pretrained(out)
        assert equal(back.encoder.state_dict(), rae.encoder.state_dict())
        averaged = {k: v + 1 for k, v in rae.decoder.state_dict().items()}
        assert equal(back.decoder.state_dict(), averaged)
        assert (back.latent_std is None) == ("--stats" not in options)


def test_the_manifest_records_the_autoencoder_of_the_run(tmp_path: Path, capsys) -> None:
    content = load(STAGE2 / "stage2_train_ckpt.pt")
    stage_2 = {"target": "DiTDH", "params": load_case("e2e/sample_py/golden").meta["stage_2"]}
    torch.save(content | {"config": {"stage_1": stage_1(), "stage_2": stage_2}}, tmp_path / "c.pt")
    assert convert(tmp_path / "c.pt", "--to", "pretrained", "--out", tmp_path / "dit") == 0
    assert "note" not in capsys.readouterr().out
    made_with = read_weights_manifest(tmp_path / "dit").made_with["dit"]
    assert made_with.keys() == {"encoder", "statistics"}
    DiTDH.from_pretrained(tmp_path / "dit", rae=build_rae("dinov2"))
    assert convert(STAGE2 / "stage2_raw.pt", "--to", "pretrained", "--out", tmp_path / "raw") == 0
    assert "note: the manifest records no autoencoder" in capsys.readouterr().out


class AutoencoderStage(LinearTask):
    """Trains a tiny autoencoder."""

    def __init__(self) -> None:
        self.model = build_rae("dinov2")

    def to_published_state_dict(self, state):
        return state


def test_a_results_folder(tmp_path: Path, capsys) -> None:
    task = AutoencoderStage()
    save(tmp_path / "run" / "checkpoints", 10, task)
    config = run_yaml(tmp_path, stage_1=stage_1())
    arguments = (tmp_path / "run", "--config", config, "--to")
    assert convert(*arguments, "pretrained", "--out", tmp_path / "rae") == 0
    assert "training checkpoint of step 10, ema weights" in capsys.readouterr().out
    assert equal(RAE.from_pretrained(tmp_path / "rae").state_dict(), task.model.state_dict())
    assert convert(*arguments, "published", "--part", "stats", "--out", tmp_path / "s.pt") == 0
    recorded = load(GOLDEN / "rae" / "dinov2" / "stat.pt")
    torch.testing.assert_close(load(tmp_path / "s.pt"), recorded)


def test_the_time_shift_of_the_training_is_kept(tmp_path: Path) -> None:
    content = load(STAGE2 / "stage2_train_ckpt.pt")
    run = {"stage_1": stage_1(), "misc": {"time_dist_shift_base": 64.0}}
    torch.save(content | {"config": run}, tmp_path / "c.pt")
    assert convert(tmp_path / "c.pt", "--to", "pretrained", "--out", tmp_path / "dit") == 0
    assert convert(tmp_path / "dit", "--to", "pretrained", "--out", tmp_path / "again") == 0
    assert resolve_model(tmp_path / "again", (), tmp_path).config.misc.time_dist_shift_base == 64


# ----- errors: one line, no code executed, nothing written


class Executed:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def convert_error(capsys, tmp_path: Path, source: object, *options: object) -> str:
    """Return the error message of a conversion that must write nothing."""
    (tmp_path / "out").mkdir(exist_ok=True)
    out = tmp_path / "out" / "new"
    assert convert(source, "--out", out, *(options or ("--to", "published"))) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert list((tmp_path / "out").iterdir()) == []
    return captured.err


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["alone", "in a state dict", "old pickle"])
def test_code_in_a_pickle_is_not_executed(capsys, tmp_path: Path, where: str) -> None:
    marker, source = tmp_path / "executed", tmp_path / "evil.pt"
    if where == "alone":
        torch.save(Executed(marker), source)
    elif where == "in a state dict":
        torch.save({**load(DECODER), "extra": Executed(marker)}, source)
    else:
        source.write_bytes(pickle.dumps({"var": Executed(marker)}, protocol=2))
    message = convert_error(capsys, tmp_path, source)
    assert str(source) in message
    assert "mkdir" in message
    assert not marker.exists()


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module."])
def test_wrapped_checkpoints_are_read_by_every_command(tmp_path: Path, wrapper: str) -> None:
    """``ckpt`` of a configuration: tests/interop/test_instantiate.py."""
    state = {f"{wrapper}decoder.{name}": tensor for name, tensor in load(DECODER).items()}
    for number, content in enumerate(
        (state, {"ema": state, "model": state}, {"state_dict": state})
    ):
        source = tmp_path / f"{number}.pt"
        torch.save(content, source)
        converted, exported = tmp_path / f"c{number}.pt", tmp_path / f"e{number}.pt"
        assert convert(source, "--to", "published", "--part", "decoder", "--out", converted) == 0
        export_decoder(source, exported)
        for written in (load(converted), load(exported)):
            assert written.keys() == load(DECODER).keys()
            assert all(torch.equal(written[k], v) for k, v in load(DECODER).items())


def test_unknown_keys_are_listed(capsys, tmp_path: Path) -> None:
    torch.save({f"unet.{i}.weight": torch.zeros(2) for i in range(14)}, tmp_path / "f.pt")
    message = convert_error(capsys, tmp_path, tmp_path / "f.pt")
    assert "holds no decoder, autoencoder" in message
    assert "unet.0.weight" in message
    assert "unet.9.weight and 4 more (14)" in message


def test_unexpected_and_missing_keys_are_listed(capsys, tmp_path: Path) -> None:
    state = load(STAGE2 / "stage2_raw.pt")
    state["unknown"] = state.pop("blocks.0.attn.qkv.bias")
    torch.save(state, tmp_path / "f.pt")
    message = convert_error(capsys, tmp_path, tmp_path / "f.pt")
    assert "missing blocks.0.attn.qkv.bias; unexpected unknown" in message


@pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_truncated_file(capsys, tmp_path: Path, kind: str, part: float) -> None:
    file = tmp_path / f"d.{kind}"
    assert convert(DECODER, "--to", {"pt": "published"}.get(kind, kind), "--out", file) == 0
    capsys.readouterr()
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * part)])
    assert f"{file} cannot be read" in convert_error(capsys, tmp_path, file)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (DECODER, ("--to", "diffusers"), "diffusers' layout holds complete models"),
        (DECODER, ("--to", "safetensors"), "must be named .safetensors"),
        (DECODER, ("--to", "published", "--part", "stage2"), "a decoder, not of a diffusion tra"),
        (DECODER, ("--to", "published", "--part", "stats"), "no part 'stats'"),
        (
            DECODER,
            ("--to", "published", "--stats", DECODER),
            "statistics need a complete autoencoder",
        ),
        (
            STAGE2 / "stage2_raw.pt",
            ("--to", "diffusers"),
            "holds complete models",
        ),
        ("no/such/file.pt", ("--to", "published"), "no/such/file.pt"),
        (GOLDEN, ("--to", "published"), "holds no checkpoint"),
        (GOLDEN / "rae/dinov2/encoder", ("--to", "pretrained"), "a dinov2_with_registers, not an"),
    ],
)
def test_unsupported_conversions(capsys, tmp_path, source, options, message) -> None:
    assert message in convert_error(capsys, tmp_path, source, *options)


def test_an_autoencoder_without_settings(capsys, tmp_path: Path) -> None:
    source = stage1_checkpoint(tmp_path / "c.pt", build_rae("dinov2"))
    message = convert_error(capsys, tmp_path, source, "--to", "pretrained")
    assert "needs the settings of the autoencoder" in message
    assert "--config" in message


def test_a_configuration_that_does_not_fit(capsys, tmp_path: Path) -> None:
    source = stage1_checkpoint(tmp_path / "c.pt", build_rae("mae"))
    config = run_yaml(tmp_path, stage_1=stage_1())
    message = convert_error(capsys, tmp_path, source, "--to", "pretrained", "--config", config)
    assert "does not fit RAE: missing encoder.encoder." in message
    assert "more (" in message
