"""RAE: golden values, published keys, properties and errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from golden_case import GOLDEN, load_case
from rae_cases import CASES, build_rae, load_rae_case, rae_arguments
from safetensors.torch import save_file

from rae_xla.errors import UserError
from rae_xla.models.encoders import ENCODERS
from rae_xla.models.encoders.frozen import DINOv2Encoder, MAEEncoder, SigLIP2Encoder
from rae_xla.models.rae import RAE

KEYMAPS = ("RAE_DINOv2-B_decXL", "RAE_DINOv2-B_512_decXL", "RAE_SigLIP2_decXL", "RAE_MAE_decXL")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return load_rae_case(request.param), build_rae(request.param)


@pytest.fixture(scope="module")
def dinov2() -> RAE:
    return build_rae("dinov2").eval()


# ----- golden values


@pytest.mark.parametrize("image", ["0", "1"])  # 1 is of another size: resized
def test_encode_and_decode(golden, image: str) -> None:
    case, rae = golden
    rae.eval()
    close(rae.encode(case[f"in.image{image}"]), case[f"out.latent{image}"])
    close(rae.decode(case[f"out.latent{image}"]), case[f"out.recon{image}"])
    close(rae(case[f"in.image{image}"]), case[f"out.recon{image}"])


def test_decode_any_latent(golden) -> None:
    case, rae = golden
    close(rae.decode(case["in.random_latent"]), case["out.random_latent_decoded"])


def test_train_mode_noise_given_and_generated(golden) -> None:
    case, rae = golden
    rae.train()
    if rae.noise_tau > 0:
        noise = case["in.noise_uniform"].flatten(), case["in.noise_normal"]
        close(rae.encode(case["in.image0"], noise), case["out.latent_train"])
    torch.manual_seed(case.meta["seed"])
    close(rae.encode(case["in.image0"]), case["out.latent_train"])
    rae.eval()
    close(rae.encode(case["in.image0"]), case["out.latent0"])


def test_decoder_gradients(golden) -> None:
    case, rae = golden
    rae.eval().zero_grad()
    loss = (rae(case["in.image0"]) - case["in.grad_target"]).abs().mean()
    assert loss.item() == pytest.approx(case.meta["l1_loss"], rel=1e-5)
    loss.backward()
    norms = {k: p.grad.norm().item() for k, p in rae.named_parameters() if p.grad is not None}
    # The gradient of a key bias is zero up to rounding, because softmax is invariant to it.
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-3, abs=1e-8)
    assert {k for k, p in rae.named_parameters() if p.requires_grad} == norms.keys()


def test_gradients_with_trainable_position_table(golden) -> None:
    case, rae = golden
    rae = copy.deepcopy(rae).eval()
    rae.decoder.requires_grad_(True)
    rae.zero_grad()
    (rae(case["in.image0"]) - case["in.grad_target"]).abs().mean().backward()
    total = torch.stack([p.grad.norm() for p in rae.decoder.parameters()]).norm().item()
    assert total == pytest.approx(case.meta["grad_total_norm_decoder_all_trainable"], rel=1e-3)


def test_image_statistics(golden) -> None:
    case, rae = golden
    assert torch.equal(rae.encoder_mean, case["const.encoder_mean"])
    assert torch.equal(rae.encoder_std, case["const.encoder_std"])


def test_sizes(golden) -> None:
    case, rae = golden
    channels, height, width = rae.latent_size
    latent = [2, channels, height, width] if rae.reshape_to_2d else [2, height * width, channels]
    assert latent == case.meta["latent_shape"]
    assert rae.num_tokens == height * width
    assert [2, 3, rae.image_size, rae.image_size] == case.meta["recon_shape"]


# ----- state dicts


@pytest.mark.parametrize("name", KEYMAPS)
def test_keys_and_shapes_match_published_files(tmp_path: Path, name: str) -> None:
    meta = load_case(f"keymaps/{name}").meta
    config = meta["config"]
    decoder = load_case(f"keymaps/decoder_{config['decoder']}").meta["config"]
    (tmp_path / "config.json").write_text(json.dumps(config["encoder_hf"]))
    with torch.device("meta"):  # configurations alone: there are no weights in the folder
        rae = RAE(
            encoder_cls=config["encoder_cls"],
            encoder_config_path=str(tmp_path),
            encoder_input_size=config["encoder_input_size"],
            decoder_config_path=decoder["decoder_config"],
            decoder_patch_size=decoder["decoder_patch_size"],
            pretrained_decoder_path="models/not/downloaded.pt",
            normalization_stat_path="models/not/downloaded_either.pt",
        )
    keys = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in rae.state_dict().items()
    }
    assert keys == meta["keys"]
    assert sum(parameter.numel() for parameter in rae.parameters()) == meta["n_params"]
    grid = config["encoder_input_size"] // rae.encoder.patch_size
    assert rae.latent_size == (768, grid, grid)
    latents = rae(torch.empty(2, 3, rae.image_size, rae.image_size, device="meta"))
    assert latents.shape == (2, 3, rae.image_size, rae.image_size)


def test_state_dict_round_trip_and_copies(dinov2: RAE) -> None:
    image = load_rae_case("dinov2")["in.image1"]
    other = build_rae("dinov2", pretrained_decoder_path=None).eval()
    assert not torch.equal(other(image), dinov2(image))
    other.load_state_dict(dinov2.state_dict(), strict=True)
    assert torch.equal(other(image), dinov2(image))
    assert torch.equal(copy.deepcopy(other)(image), dinov2(image))


def test_only_decoder_is_trainable() -> None:
    rae = build_rae("dinov2").train()
    assert rae.decoder.training
    assert not any(module.training for module in rae.encoder.modules())
    trained = {name for name, p in rae.named_parameters() if p.requires_grad}
    assert all(name.startswith("decoder.") for name in trained)
    assert "decoder.decoder_pos_embed" not in trained


# ----- behaviour that the reference implementation lacks


def test_no_noise_in_eval_mode(dinov2: RAE) -> None:
    case = load_rae_case("dinov2")
    noise = case["in.noise_uniform"], case["in.noise_normal"]
    assert torch.equal(dinov2.encode(case["in.image0"], noise), dinov2.encode(case["in.image0"]))


def test_more_tokens_than_decoder_grid() -> None:
    rae = build_rae("dinov2", normalization_stat_path=None)
    assert rae.decode(torch.randn(1, 32, 6, 6)).shape == (1, 3, 32, 32)
    with pytest.raises(UserError, match=r"\(32, 6, 6\), but the latent statistics .*\(32, 4, 4\)"):
        build_rae("dinov2").decode(torch.randn(1, 32, 6, 6))


def test_non_square_images(dinov2: RAE) -> None:
    assert dinov2.encode(torch.rand(1, 3, 30, 70)).shape == (1, 32, 4, 4)


def test_latent_statistics_without_mean(tmp_path: Path) -> None:
    case = load_rae_case("dinov2")
    torch.save({"var": case["stat.var"]}, tmp_path / "stat.pt")
    torch.save(
        {"mean": torch.zeros_like(case["stat.mean"]), "var": case["stat.var"]}, tmp_path / "both.pt"
    )
    actual = [
        build_rae("dinov2", normalization_stat_path=tmp_path / name).eval()(case["in.image0"])
        for name in ("stat.pt", "both.pt")
    ]
    close(actual[0], actual[1])


def test_token_latents_with_statistics(tmp_path: Path) -> None:
    image = load_rae_case("dinov2_tokens_affine")["in.image0"]
    mean, var = torch.randn(16, 24), torch.rand(16, 24) + 0.5
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    plain = build_rae("dinov2_tokens_affine").eval()
    rae = build_rae("dinov2_tokens_affine", normalization_stat_path=tmp_path / "stat.pt").eval()
    close(rae.encode(image), (plain.encode(image) - mean) / torch.sqrt(var + 1e-5))
    close(rae(image), plain(image))


def test_encoder_folder_defaults_to_image_processor_folder() -> None:
    case = load_rae_case("dinov2")
    close(build_rae("dinov2", encoder_params={}).eval()(case["in.image0"]), case["out.recon0"])


RECORDED = (DINOv2Encoder, SigLIP2Encoder, MAEEncoder)


@pytest.mark.parametrize("name", [n for n, cls in ENCODERS.items() if cls in RECORDED])
def test_published_and_own_encoder_names(name: str) -> None:
    golden = {"D": "dinov2", "S": "siglip2", "M": "mae"}[name[0]]
    rae = build_rae(golden, encoder_cls=name)
    assert type(rae.encoder) is ENCODERS[name]


def test_decoder_from_safetensors(tmp_path: Path) -> None:
    case = load_rae_case("dinov2")
    state = torch.load(GOLDEN / "rae/dinov2/decoder.pt", weights_only=True)
    save_file(state, tmp_path / "decoder.safetensors")
    rae = build_rae("dinov2", pretrained_decoder_path=str(tmp_path / "decoder.safetensors")).eval()
    close(rae(case["in.image0"]), case["out.recon0"])


def test_compiles_without_graph_break(dinov2: RAE) -> None:
    image = load_rae_case("dinov2")["in.image1"]
    compiled = torch.compile(dinov2, fullgraph=True, backend="eager")
    close(compiled(image), dinov2(image))


def test_dtype_conversion(dinov2: RAE) -> None:
    image = load_rae_case("dinov2")["in.image0"]
    double = copy.deepcopy(dinov2).double()
    torch.testing.assert_close(double(image.double()).float(), dinov2(image), atol=1e-4, rtol=1e-4)


# ----- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_input_size": 50}, "encoder_input_size 50 must be a multiple .* 14, such as 56"),
        ({"encoder_input_size": 5}, "encoder_input_size 5 is smaller than a patch"),
        ({"encoder_cls": "Dinov2withNrom"}, r"unknown encoder_cls .*did you mean Dinov2withNorm\?"),
        ({"encoder_params": {"normalise": True}}, r"'normalise' \(did you mean normalize\?\)"),
        ({"encoder_params": {"dinov2_path": "no/such/place"}}, "no/such/place does not exist"),
        ({"encoder_config_path": "./nowhere"}, r"\./nowhere does not exist"),
        (
            {"decoder_config_path": "configs/nowhere"},
            r"configs/nowhere/config\.json does not exist",
        ),
        ({"decoder_patch_size": 0}, "patch_size must be a positive integer, got 0"),
        (
            {"pretrained_decoder_path": "no/dec.pt"},
            r"pretrained_decoder_path: no/dec\.pt does not exist",
        ),
        ({"pretrained_decoder_path": "models/d/m.pt"}, "hf download nyu-visionx/RAE-col.* d/m.pt"),
        (
            {"normalization_stat_path": "no/stat.pt"},
            r"normalization_stat_path: no/stat\.pt does not",
        ),
        ({"noise_tau": -0.1}, "noise_tau must be at least 0"),
    ],
)
def test_invalid_settings_raise(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_rae("dinov2", **changes)


VAR = torch.ones(32, 4, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no `var`"),
        ({"mean": VAR}, "has no `var`"),
        ({"mean": VAR, "var": None}, "has no `var`"),
        ([VAR], "has no `var`"),
        ({"mean": [0.0], "var": VAR}, "`mean` in .* is not a tensor"),
        ({"var": -VAR}, "negative or NaN"),
        ({"var": torch.ones(32, 16, 16)}, r"latents .* \(32, 4, 4\), .* \(32, 16, 16\)"),
        ({"mean": torch.ones(16), "var": VAR}, r"latents .* \(32, 4, 4\), .* \(16,\)"),
    ],
)
def test_unusable_latent_statistics_raise(tmp_path: Path, content, message) -> None:
    torch.save(content, tmp_path / "stat.pt")
    with pytest.raises(UserError, match=message) as caught:
        build_rae("dinov2", normalization_stat_path=str(tmp_path / "stat.pt"))
    assert str(tmp_path / "stat.pt") in str(caught.value)


def decoder_state() -> dict[str, torch.Tensor]:
    return torch.load(GOLDEN / "rae/dinov2/decoder.pt", weights_only=True)


def decoder_error(path: Path, content: object) -> str:
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        build_rae("dinov2", pretrained_decoder_path=str(path))
    message = str(caught.value)
    assert str(path) in message
    return message


def test_decoder_with_mismatched_weights_raises(tmp_path: Path) -> None:
    state = decoder_state()
    state["extra.weight"] = state.pop("decoder_norm.bias")
    state["decoder_pred.bias"] = torch.zeros(3)
    message = decoder_error(tmp_path / "d.pt", state)
    assert "missing decoder_norm.bias" in message
    assert "unexpected extra.weight" in message
    assert "decoder_pred.bias is (3,), expected (192,)" in message


def test_training_checkpoint_as_decoder_raises(tmp_path: Path) -> None:
    message = decoder_error(tmp_path / "d.pt", {"model": decoder_state(), "ema": {}, "step": 3})
    assert "a training checkpoint" in message
    assert "rae-xla checkpoints export" in message


def test_complete_rae_as_decoder_raises(tmp_path: Path, dinov2: RAE) -> None:
    assert "a complete RAE" in decoder_error(tmp_path / "d.pt", dinov2.state_dict())


def test_unreadable_weight_file_raises(tmp_path: Path) -> None:
    (tmp_path / "d.pt").write_text("hello")
    with pytest.raises(UserError, match=r"d\.pt cannot be read as a torch file"):
        build_rae("dinov2", pretrained_decoder_path=str(tmp_path / "d.pt"))


def test_weight_file_with_code_raises(tmp_path: Path) -> None:
    torch.save({"weight": Path("/")}, tmp_path / "d.pt")
    with pytest.raises(UserError, match=r"d\.pt contains objects .*\(pathlib\..*arbitrary code"):
        build_rae("dinov2", pretrained_decoder_path=str(tmp_path / "d.pt"))


def test_wrong_image_and_latent_shapes_raise(dinov2: RAE) -> None:
    with pytest.raises(UserError, match=r"\(batch, 3, height, width\), got \(1, 4, 56, 56\)"):
        dinov2.encode(torch.zeros(1, 4, 56, 56))
    with pytest.raises(UserError, match=r"\(batch, C, h, w\), got \(1, 16, 32\)"):
        dinov2.decode(torch.zeros(1, 16, 32))
    arguments = rae_arguments("dinov2_tokens_affine")
    with pytest.raises(UserError, match=r"\(batch, N, C\), got \(1, 24, 4, 4\)"):
        RAE(**arguments).decode(torch.zeros(1, 24, 4, 4))
