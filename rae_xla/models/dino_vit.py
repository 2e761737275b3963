"""The frozen DINO vision transformer whose tokens the discriminator judges (Caron et al. 2021).

Parameters are named as in timm, which is how the published backbone file names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.embeddings import PatchEmbed
from rae_xla.models.layers import Attention, Mlp
from rae_xla.models.resize import resize_bilinear
from rae_xla.models.weights import is_meta, load_strict, read_weight_file

IMAGE_SIZE = 224
# Of ImageNet, in RGB.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEY_DEPTHS = (2, 5, 8, 11)
"""Blocks that are tapped besides the last, counted from 0."""

HUB_REPOSITORY, HUB_FILE = "nyu-visionx/RAE-collections", "discs/dino_vit_small_patch8_224.pth"
_SETTING = "gan.disc.arch.dino_ckpt_path"
_RECIPE = "gan.disc.arch.recipe"


@dataclass(frozen=True)
class DINOShape:
    """Sizes of a DINO ViT; ``patch_size`` in pixels of a 224-pixel image.

    Raises:
        UserError: if the sizes do not fit each other.
    """

    depth: int
    embed_dim: int
    num_heads: int
    patch_size: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type == "int"
            number = isinstance(value, int if whole else (int, float))
            if isinstance(value, bool) or not number or value <= 0:
                kind = "whole number" if whole else "number"
                raise UserError(f"{_RECIPE}: {field.name} must be a positive {kind}, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"{_RECIPE}: embed_dim {self.embed_dim} is not divisible by num_heads "
                f"{self.num_heads}; choose a number of heads that divides it"
            )
        if IMAGE_SIZE % self.patch_size:
            raise UserError(
                f"{_RECIPE}: patch_size {self.patch_size} does not divide {IMAGE_SIZE}, the side "
                "images are resized to; choose one that does, such as 8, 14, 16 or 32"
            )

    @property
    def num_tokens(self) -> int:
        """Patch tokens of one image."""
        return (IMAGE_SIZE // self.patch_size) ** 2


RECIPES = {
    "S_8": DINOShape(depth=12, embed_dim=384, num_heads=6, patch_size=8),
    "S_16": DINOShape(depth=12, embed_dim=384, num_heads=6, patch_size=16),
    "B_16": DINOShape(depth=12, embed_dim=768, num_heads=12, patch_size=16),
}
"""The published backbones by their published names."""


def resolve_recipe(recipe: str | Mapping[str, Any] | DINOShape) -> DINOShape:
    """Find the sizes of a backbone given by name, or as the fields of a ``DINOShape``.

    Raises:
        UserError: if there is no such name or field, a field is left out, or a value is wrong.
    """
    if isinstance(recipe, DINOShape):
        return recipe
    known = [field.name for field in fields(DINOShape)]
    needed = [field.name for field in fields(DINOShape) if field.default is MISSING]
    ways = f"name one of {', '.join(RECIPES)}, or give {', '.join(needed)}"
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise UserError(f"{_RECIPE}: there is no {recipe!r}{_near(recipe, RECIPES)}; {ways}")
        return RECIPES[recipe]
    if not isinstance(recipe, Mapping):
        raise UserError(f"{_RECIPE}: {recipe!r} is neither a name nor a mapping; {ways}")
    for key in recipe:
        if key not in known:
            raise UserError(
                f"{_RECIPE}: a backbone has no {key!r}{_near(str(key), known)}; "
                f"its fields are {', '.join(known)}"
            )
    if missing := [key for key in needed if key not in recipe]:
        raise UserError(f"{_RECIPE}: {', '.join(missing)} left out; {ways}")
    return DINOShape(**recipe)


class DINOBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: DINOShape) -> None:
        super().__init__()
        width = shape.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.attn = Attention(width, shape.num_heads, use_qknorm=False, use_rmsnorm=False)
        self.norm2 = nn.LayerNorm(width, eps=shape.norm_eps)
        self.mlp = Mlp(width, int(width * shape.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + L, embed_dim) -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DINOViT(nn.Module):
    """DINO ViT, frozen; random until ``load_dino`` fills it.

    Gradients reach the images, never the weights. ``norm`` is part of the published file and of
    the state dict, but the taps are taken before it.
    """

    x_scale: Tensor
    x_shift: Tensor

    def __init__(self, shape: DINOShape) -> None:
        super().__init__()
        self.shape = shape
        self.cls_token = nn.Parameter(torch.empty(1, 1, shape.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.num_tokens, shape.embed_dim))
        self.patch_embed = PatchEmbed(IMAGE_SIZE, shape.patch_size, 3, shape.embed_dim)
        self.blocks = nn.ModuleList(DINOBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.embed_dim, eps=shape.norm_eps)
        # (x + 1) / 2 is in [0, 1]; minus mean, over std. Not in the state dict: it has no such key.
        mean = torch.tensor(IMAGE_MEAN).view(1, -1, 1, 1)
        std = torch.tensor(IMAGE_STD).view(1, -1, 1, 1)
        self.register_buffer("x_scale", 0.5 / std, persistent=False)
        self.register_buffer("x_shift", (0.5 - mean) / std, persistent=False)
        self.reset_parameters()
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw class token and positions from N(0, 0.02)."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def taps(self, images: Tensor, key_depths: Iterable[int] | None = None) -> list[Tensor]:
        """Patch tokens after the last block, then after each key depth in increasing order.

        Images (B, 3, H, W) in [-1, 1] of any size are resized to 224 pixels, bilinearly. Each
        tap is (B, L, embed_dim), without the class token and before the final norm.
        ``key_depths`` counts from 0, (2, 5, 8, 11) when None; those beyond the depth are dropped.
        """
        depths = self.key_depths(key_depths)
        x = resize_bilinear(images.float(), IMAGE_SIZE) * self.x_scale + self.x_shift
        tokens = self.patch_embed(x)
        cls_token = self.cls_token.expand(len(tokens), -1, -1)
        x = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1) + self.pos_embed
        found = []
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth in depths:
                found.append(x[:, 1:])
        return [x[:, 1:], *found]

    def key_depths(self, key_depths: Iterable[int] | None = None) -> tuple[int, ...]:
        """Blocks that ``taps`` taps besides the last, for its argument of this name."""
        chosen = KEY_DEPTHS if key_depths is None else key_depths
        return tuple(sorted({depth for depth in chosen if 0 <= depth < self.shape.depth}))


def load_dino(
    path: str | Path,
    recipe: str | Mapping[str, Any] | DINOShape,
    norm_eps: float | None = None,
) -> DINOViT:
    """Build the backbone of a recipe and read its published weight file, strictly.

    On the meta device nothing is read.

    The key third of every qkv bias is set to zero, as the published discriminator does; softmax
    does not see it.

    Args:
        path: the weight file.
        recipe: the backbone's sizes, by name or field (``resolve_recipe``).
        norm_eps: epsilon of its layer norms in place of the recipe's. The published discriminator
            gives its own ``norm_eps`` (``gan.disc.arch.norm_eps``) to the backbone too.

    Raises:
        UserError: if the recipe is none, or the file is missing or does not fit it.
    """
    shape = resolve_recipe(recipe)
    model = DINOViT(shape if norm_eps is None else replace(shape, norm_eps=norm_eps))
    if is_meta(model):
        return model
    if not Path(path).expanduser().is_file():
        raise UserError(
            f"{_SETTING}: there is no file {path}; the discriminator's frozen backbone is "
            f"{HUB_FILE} of {HUB_REPOSITORY}: `hf download {HUB_REPOSITORY} {HUB_FILE} "
            f"--local-dir models`, then {_SETTING}=models/{HUB_FILE}; or train without the "
            "discriminator: gan.loss.disc_weight=0"
        )
    state = read_weight_file(path, _SETTING)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{_SETTING}: {path} is not a state dict; {_RECIPE} needs {HUB_FILE}")
    load_strict(model, state, f"{_SETTING}: {path}")
    width = model.shape.embed_dim
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qkv.bias"):
                parameter[width : 2 * width].zero_()
    return model


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
