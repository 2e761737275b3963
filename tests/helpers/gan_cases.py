"""Build the tiny stage-1 networks of ``tests/golden/disc``."""

from __future__ import annotations

import functools

import numpy as np
import torch
from golden_case import Case, load_case

from rae_xla.models.dino_vit import DINOViT, DINOViTConfig
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.lpips import LPIPS
from rae_xla.models.weights import load_strict

DISCRIMINATORS = ("dinodisc_a", "dinodisc_b_gn")
SIZES = ("depth", "embed_dim", "num_heads", "patch_size", "mlp_ratio")
LPIPS_SEED = 5001


@functools.cache
def load_disc_case(name: str) -> Case:
    return load_case(f"disc/{name}")


def recipe_of(name: str) -> DINOViTConfig:
    case = load_disc_case(name).meta
    sizes = {k: case["recipe_injected"][k] for k in SIZES}
    # The recorded numbers use the epsilon of the discriminator (the one of the recipe: 2e-5 off).
    return DINOViTConfig(**sizes, norm_eps=case["constructor"]["norm_eps"])


def backbone_file(name: str) -> dict[str, torch.Tensor]:
    """Return the weights of the backbone in the file format, with key biases."""
    return load_disc_case(name).under("dino")


def build_backbone(name: str) -> DINOViT:
    """Return the backbone in the state that ``load_dino`` returns it."""
    backbone, width = DINOViT(recipe_of(name)), recipe_of(name).embed_dim
    state = {key: value.clone() for key, value in backbone_file(name).items()}
    for key, value in state.items():
        if key.endswith("qkv.bias"):
            value[width : 2 * width] = 0
    load_strict(backbone, state, name)
    return backbone


def build_discriminator(name: str) -> DinoDiscriminator:
    case = load_disc_case(name)
    disc = DinoDiscriminator(build_backbone(name), **case.meta["constructor"])
    load_strict(disc, case.under("state"), name)
    return disc


def build_lpips(seed: int = LPIPS_SEED) -> LPIPS:
    """Return LPIPS with the random weights of the recipe in ``disc/lpips_random_vgg``."""
    lpips = LPIPS()
    state = lpips.state_dict()
    for index, key in enumerate(sorted(state)):
        shape = tuple(state[key].shape)
        if key.startswith("scaling_layer"):
            continue
        draw = np.random.RandomState(seed + index).standard_normal(shape)
        if ".slice" in key and len(shape) == 4:
            draw = draw * np.sqrt(2 / np.prod(shape[1:]))
        else:
            draw = 0.05 * draw if key.endswith("bias") else np.abs(draw) * 0.1 + 0.01
        state[key] = torch.from_numpy(draw).float()
    load_strict(lpips, state, "random LPIPS")
    return lpips
