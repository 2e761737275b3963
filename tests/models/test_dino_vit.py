"""DINO backbone: golden values, published keys, recipes and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gan_cases import DISCRIMINATORS, build_backbone, load_disc_case, recipe_of
from golden_case import load_case
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.dino_vit import RECIPES, DINOViT, DINOViTConfig, load_dino, resolve_recipe

KEYMAPS = {"S_8": "S_8_ks9", "S_16": "S_16_ks3", "B_16": "B_16_ks3"}
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 56}


# ----- golden values


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_constants(name: str) -> None:
    backbone, case = build_backbone(name), load_disc_case(name)
    torch.testing.assert_close(backbone.x_scale, case["const.x_scale"], atol=0, rtol=2e-7)
    torch.testing.assert_close(backbone.x_shift, case["const.x_shift"], atol=0, rtol=5e-7)


def test_intermediate_tokens() -> None:
    case, backbone = load_disc_case("dinodisc_a"), build_backbone("dinodisc_a")
    with torch.no_grad():
        taps = backbone.intermediate_tokens(case["in.fake"], case.meta["constructor"]["key_depths"])
    assert len(taps) == 3
    assert torch.equal(taps[0], taps[2])  # the last block is a key depth too
    for index, tokens in enumerate(taps):
        assert tokens.shape == (3, 196, 32)
        for actual, key in ((tokens.mean(1), "mean_tokens"), (tokens[:, 0], "tok0")):
            expected = case[f"mid.act{index}_{key}"]
            torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_and_shapes_match_published_files(recipe: str) -> None:
    meta = load_case(f"keymaps/discriminator_{KEYMAPS[recipe]}").meta
    with torch.device("meta"):
        backbone = DINOViT(RECIPES[recipe])
    keys = {k: [list(v.shape), "float32"] for k, v in backbone.state_dict().items()}
    assert keys == meta["dino_backbone_keys"]
    assert list(keys) == list(meta["dino_backbone_keys"])
    assert sum(p.numel() for p in backbone.parameters()) == meta["dino_backbone_params"]
    taps = backbone.intermediate_tokens(torch.empty(1, 3, 64, 64, device="meta"))
    assert len(taps) == 5
    assert {tuple(tap.shape) for tap in taps} == {
        (1, backbone.config.num_tokens, backbone.config.embed_dim)
    }


# ----- properties


def test_gradient_reaches_images_but_not_weights() -> None:
    backbone = build_backbone("dinodisc_a")
    assert not any(p.requires_grad for p in backbone.parameters())
    images = load_disc_case("dinodisc_a")["in.fake"].clone().requires_grad_()
    sum(tap.square().mean() for tap in backbone.intermediate_tokens(images, [0])).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_key_depths() -> None:
    backbone = DINOViT(resolve_recipe({**TINY, "depth": 7}))
    assert backbone.key_depths() == (2, 5)
    assert backbone.key_depths([6, 0, 0, 7, -1]) == (0, 6)
    assert backbone.key_depths([]) == ()


def test_loading_sets_only_key_bias_to_zero(tmp_path: Path) -> None:
    saved = DINOViT(resolve_recipe(TINY)).state_dict()
    for value in saved.values():
        value.uniform_(0.5, 1)
    torch.save(saved, tmp_path / "dino.pth")
    actual = load_dino(tmp_path / "dino.pth", TINY).state_dict()
    for key, value in saved.items():
        if key.endswith("qkv.bias"):
            value = torch.cat([value[:32], torch.zeros(32), value[64:]])
        assert torch.equal(actual[key], value)


def test_norm_eps_overrides_recipe(tmp_path: Path) -> None:
    torch.save(DINOViT(resolve_recipe(TINY)).state_dict(), tmp_path / "dino.pth")
    assert load_dino(tmp_path / "dino.pth", TINY).blocks[0].norm1.eps == 1e-6
    assert load_dino(tmp_path / "dino.pth", TINY, norm_eps=1e-5).blocks[0].norm1.eps == 1e-5


@pytest.mark.parametrize("size", [(512, 512), (224, 224), (100, 60)])
def test_images_of_other_sizes(size: tuple[int, int]) -> None:
    taps = DINOViT(resolve_recipe(TINY)).intermediate_tokens(torch.rand(1, 3, *size), [0])
    assert [tap.shape for tap in taps] == [(1, 16, 32), (1, 16, 32)]


def test_under_autocast() -> None:
    case, backbone = load_disc_case("dinodisc_a"), build_backbone("dinodisc_a")

    def run() -> list[Tensor]:
        with torch.no_grad():
            return backbone.intermediate_tokens(case["in.fake"], [0])

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = run()
    for a, b in zip(lower, exact, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


# ----- errors


def test_recipe_from_fields() -> None:
    shape = resolve_recipe({**TINY, "mlp_ratio": 2, "norm_eps": 1e-5})
    assert shape == DINOViTConfig(2, 32, 4, 56, mlp_ratio=2, norm_eps=1e-5)
    assert resolve_recipe(shape) is shape
    assert recipe_of("dinodisc_a").depth == 3


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "S_18",
            r"unknown backbone 'S_18' \(did you mean S_\d+\?\); choose one of S_8, S_16, B_16, or",
        ),
        ({"depth": 2}, "missing embed_dim, num_heads, patch_size"),
        ({**TINY, "heads": 3}, r"unknown field 'heads' \(did you mean num_heads\?\)"),
        ({**TINY, "depth": 0}, "depth must be a positive integer, got 0"),
        ({**TINY, "depth": "2"}, "depth must be a positive integer, got '2'"),
        ({**TINY, "num_heads": 5}, "embed_dim 32 is not divisible by num_heads 5"),
        ({**TINY, "patch_size": 15}, "patch_size 15 does not divide 224"),
        ({**TINY, "mlp_ratio": True}, "mlp_ratio must be a positive number, got True"),
        (3, "3 is neither a name nor a mapping"),
    ],
)
def test_invalid_recipes_raise(recipe, message: str) -> None:
    with pytest.raises(UserError, match=f"gan.disc.arch.recipe: .*{message}"):
        resolve_recipe(recipe)


def test_missing_file_error_contains_remedy() -> None:
    with pytest.raises(UserError) as caught:
        load_dino("models/nowhere.pth", TINY)
    message = str(caught.value)
    for part in (
        "models/nowhere.pth does not exist",
        "hf download nyu-visionx/RAE-collections discs/dino_vit_small_patch8_224.pth "
        "--local-dir models",
        "gan.disc.arch.dino_ckpt_path",
        "gan.loss.disc_weight=0",
    ):
        assert part in message
    assert "\n" not in message


def test_file_of_other_recipe_raises(tmp_path: Path) -> None:
    torch.save(DINOViT(resolve_recipe({**TINY, "depth": 3})).state_dict(), tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"dino\.pth does not fit DINOViT: unexpected blocks\.2"):
        load_dino(tmp_path / "dino.pth", TINY)
    torch.save([1], tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"dino\.pth is not a state dict"):
        load_dino(tmp_path / "dino.pth", TINY)
