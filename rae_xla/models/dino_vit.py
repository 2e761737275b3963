"""Frozen DINO vision transformer, the backbone of the discriminator (Caron et al. 2021).

Parameters are named as in timm and in the published weight file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError, did_you_mean
from rae_xla.models.embeddings import PatchEmbed
from rae_xla.models.layers import Attention, Mlp
from rae_xla.models.weights import is_meta, load_strict, read_weight_file
from rae_xla.ops.normalization import LayerNorm
from rae_xla.ops.resize import resize_bilinear

# The image size of DINO's training, in pixels.
IMAGE_SIZE = 224
# Mean and standard deviation of ImageNet, in RGB.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KEY_DEPTHS = (2, 5, 8, 11)
"""Blocks, counted from 0, whose tokens the published discriminator uses besides the last's."""

HUB_REPOSITORY, HUB_FILE = "nyu-visionx/RAE-collections", "discs/dino_vit_small_patch8_224.pth"
_SETTING = "gan.disc.arch.dino_ckpt_path"
_RECIPE = "gan.disc.arch.recipe"


@dataclass(frozen=True)
class DINOViTConfig:
    """Sizes of a DINO ViT; ``patch_size`` is in pixels of a 224-pixel image.

    Raises:
        UserError: if a value is invalid or the sizes are incompatible.
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
            integer = field.type == "int"
            number = isinstance(value, int if integer else (int, float))
            if isinstance(value, bool) or not number or value <= 0:
                kind = "integer" if integer else "number"
                raise UserError(f"{_RECIPE}: {field.name} must be a positive {kind}, got {value!r}")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"{_RECIPE}: embed_dim {self.embed_dim} is not divisible by num_heads "
                f"{self.num_heads}; choose a number of heads that divides it"
            )
        if IMAGE_SIZE % self.patch_size:
            raise UserError(
                f"{_RECIPE}: patch_size {self.patch_size} does not divide {IMAGE_SIZE}, the size "
                "that images are resized to; choose a divisor such as 8, 14, 16 or 32"
            )

    @property
    def num_tokens(self) -> int:
        """Number of patch tokens of one image."""
        return (IMAGE_SIZE // self.patch_size) ** 2


RECIPES = {
    "S_8": DINOViTConfig(depth=12, embed_dim=384, num_heads=6, patch_size=8),
    "S_16": DINOViTConfig(depth=12, embed_dim=384, num_heads=6, patch_size=16),
    "B_16": DINOViTConfig(depth=12, embed_dim=768, num_heads=12, patch_size=16),
}
"""Published backbones by their published names."""


def resolve_recipe(recipe: str | Mapping[str, Any] | DINOViTConfig) -> DINOViTConfig:
    """Return the sizes of a backbone that is given by name or by the fields of its config.

    Args:
        recipe: a key of ``RECIPES``, a mapping of ``DINOViTConfig``'s fields, or such a config.

    Raises:
        UserError: if the name or a field is unknown, a field is missing, or a value is invalid.
    """
    if isinstance(recipe, DINOViTConfig):
        return recipe
    known = [field.name for field in fields(DINOViTConfig)]
    required = [field.name for field in fields(DINOViTConfig) if field.default is MISSING]
    options = f"choose one of {', '.join(RECIPES)}, or give {', '.join(required)}"
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            hint = did_you_mean(recipe, RECIPES)
            raise UserError(f"{_RECIPE}: unknown backbone {recipe!r}{hint}; {options}")
        return RECIPES[recipe]
    if not isinstance(recipe, Mapping):
        raise UserError(f"{_RECIPE}: {recipe!r} is neither a name nor a mapping; {options}")
    for key in recipe:
        if key not in known:
            raise UserError(
                f"{_RECIPE}: unknown field {key!r}{did_you_mean(str(key), known)}; "
                f"the fields are {', '.join(known)}"
            )
    if missing := [key for key in required if key not in recipe]:
        raise UserError(f"{_RECIPE}: missing {', '.join(missing)}; {options}")
    return DINOViTConfig(**recipe)


class DINOBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: DINOViTConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = LayerNorm(width, eps=config.norm_eps)
        self.attn = Attention(width, config.num_heads, use_qknorm=False, use_rmsnorm=False)
        self.norm2 = LayerNorm(width, eps=config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, 1 + L, embed_dim)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DINOViT(nn.Module):
    """Frozen DINO ViT with random weights; ``load_dino`` builds one with published weights.

    Gradients propagate to the images but not to the weights. The final norm is in the published
    file and the state dict, but tokens are returned before it.

    Args:
        config: sizes of the backbone.
    """

    x_scale: Tensor
    x_shift: Tensor

    def __init__(self, config: DINOViTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_tokens, config.embed_dim))
        self.patch_embed = PatchEmbed(IMAGE_SIZE, config.patch_size, 3, config.embed_dim)
        self.blocks = nn.ModuleList(DINOBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        # ((x + 1) / 2 - mean) / std for x in [-1, 1]. The published file has no such keys.
        mean = torch.tensor(IMAGE_MEAN).view(1, -1, 1, 1)
        std = torch.tensor(IMAGE_STD).view(1, -1, 1, 1)
        self.register_buffer("x_scale", 0.5 / std, persistent=False)
        self.register_buffer("x_shift", (0.5 - mean) / std, persistent=False)
        self.reset_parameters()
        self.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Draw the class token and the positions from N(0, 0.02²)."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def intermediate_tokens(
        self, images: Tensor, key_depths: Iterable[int] | None = None
    ) -> list[Tensor]:
        """Return the patch tokens after the last block and after each key depth, increasing.

        Args:
            images: (B, 3, H, W) in [-1, 1], resized bilinearly to 224 pixels.
            key_depths: indices of blocks from 0, by default (2, 5, 8, 11); indices beyond the
                depth of the backbone are ignored.

        Returns:
            Tokens (B, L, embed_dim) without the class token and before the final norm: first the
            last block's, then those of the key depths.
        """
        depths = self.key_depths(key_depths)
        x = resize_bilinear(images.float(), IMAGE_SIZE) * self.x_scale + self.x_shift
        tokens = self.patch_embed(x)
        cls_token = self.cls_token.expand(len(tokens), -1, -1)
        x = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1) + self.pos_embed
        selected = []
        for depth, block in enumerate(self.blocks):
            x = block(x)
            if depth in depths:
                selected.append(x[:, 1:])
        return [x[:, 1:], *selected]

    def key_depths(self, key_depths: Iterable[int] | None = None) -> tuple[int, ...]:
        """Return the blocks that ``intermediate_tokens`` selects for ``key_depths``, increasing."""
        chosen = KEY_DEPTHS if key_depths is None else key_depths
        return tuple(sorted({depth for depth in chosen if 0 <= depth < self.config.depth}))


def load_dino(
    path: str | Path,
    recipe: str | Mapping[str, Any] | DINOViTConfig,
    norm_eps: float | None = None,
) -> DINOViT:
    """Build a backbone and load its published weight file strictly; no file on the meta device.

    The keys' part of every qkv bias is set to zero, as in the published discriminator; softmax is
    invariant to it.

    Args:
        path: the weight file.
        recipe: sizes of the backbone; see ``resolve_recipe``.
        norm_eps: epsilon of the layer norms, if it differs from the recipe's. The published
            discriminator applies its ``gan.disc.arch.norm_eps`` to the backbone too.

    Raises:
        UserError: if the recipe is invalid, or the file is missing or does not match it.
    """
    config = resolve_recipe(recipe)
    model = DINOViT(config if norm_eps is None else replace(config, norm_eps=norm_eps))
    if is_meta(model):
        return model
    if not Path(path).expanduser().is_file():
        raise UserError(
            f"{_SETTING}: {path} does not exist; download the weights of the discriminator's "
            f"backbone by `hf download {HUB_REPOSITORY} {HUB_FILE} --local-dir models` and set "
            f"{_SETTING}=models/{HUB_FILE}, or train without the discriminator: "
            "gan.loss.disc_weight=0"
        )
    state = read_weight_file(path, _SETTING)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{_SETTING}: {path} is not a state dict; use {HUB_FILE}")
    load_strict(model, state, f"{_SETTING}: {path}")
    width = model.config.embed_dim
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qkv.bias"):
                parameter[width : 2 * width].zero_()
    return model
