"""The frozen encoders: DINOv2 with registers, SigLIP2 and MAE vision transformers.

Configurations are read by transformers and weights come from any Hugging Face folder or hub id.
The forward pass is our own: parameter names are those of the published checkpoints whatever the
transformers version, positions are resampled once instead of in every forward (XLA has no bicubic
resize), and MAE does not sort its tokens to keep them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.vit import DINOv2Layer, SigLIPLayer, ViTMAELayer, ViTMlp, ViTShape
from rae_xla.models.weights import is_meta, load_strict


class _Embeddings(nn.Module):
    """Patch embedding plus a position table that is resampled to the input's grid.

    The resampled table is a plain tensor kept beside the parameters, out of the state dict. It is
    made anew when another grid comes or weights are loaded.
    """

    resampled: Tensor
    num_extra_tokens: int  # before the patches: class token, registers

    def __init__(self, antialias: bool) -> None:
        super().__init__()
        self.antialias = antialias
        self.grid = (0, 0)
        self.register_buffer("resampled", torch.zeros(0), persistent=False)
        self.register_load_state_dict_post_hook(_resample_again)

    def patch_positions(self) -> Tensor:
        """Return the stored table of the patches, (1, side², width)."""
        raise NotImplementedError

    @torch.no_grad()
    def resample(self, grid: tuple[int, int]) -> None:
        """Make the table of a grid of (rows, columns) patches, on the host, as transformers does.

        transformers resamples bicubically, with antialiasing for DINOv2 only.
        """
        table = self.patch_positions()
        side = round(table.shape[1] ** 0.5)
        resampled = table
        if grid != (side, side):
            host = table if table.is_meta else table.cpu()
            image = host.float().transpose(1, 2).unflatten(2, (side, side))
            image = F.interpolate(image, size=grid, mode="bicubic", antialias=self.antialias)
            resampled = image.flatten(2).transpose(1, 2).to(table)
        self.resampled = resampled.detach().clone()
        self.grid = grid

    def add_positions(self, patches: Tensor) -> Tensor:
        """Turn a patch map (B, width, rows, columns) into tokens with their positions added."""
        grid = (patches.shape[2], patches.shape[3])
        if grid != self.grid:
            self.resample(grid)
        return patches.flatten(2).transpose(1, 2) + self.resampled


def _resample_again(module: nn.Module, _: Any) -> None:
    assert isinstance(module, _Embeddings)
    module.resample(module.grid)


class _TokenEmbeddings(_Embeddings):
    """Embeddings of DINOv2 and MAE: a class token, registers if any, then the patches."""

    def __init__(self, config: Any, registers: int | None) -> None:
        super().__init__(antialias=registers is not None)
        width, patch = config.hidden_size, _side(config.patch_size, "patch_size")
        side = _side(config.image_size, "image_size") // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if registers is not None:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(config.num_channels, width, patch, stride=patch)}
        )
        self.num_extra_tokens = 1 + (registers or 0)

    def patch_positions(self) -> Tensor:
        return self.position_embeddings[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        patches = self.add_positions(self.patch_embeddings["projection"](images))
        extra = [self.cls_token + self.position_embeddings[:, :1]]
        if self.num_extra_tokens > 1:
            extra.append(self.register_tokens)
        batch = images.shape[0]
        return torch.cat([*(token.expand(batch, -1, -1) for token in extra), patches], dim=1)


class _PatchEmbeddings(_Embeddings):
    """Embeddings of SigLIP: the patches alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(antialias=False)
        self.num_extra_tokens = 0
        width, patch = config.hidden_size, _side(config.patch_size, "patch_size")
        side = _side(config.image_size, "image_size") // patch
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.position_embedding = nn.Embedding(side * side, width)

    def patch_positions(self) -> Tensor:
        return self.position_embedding.weight[None]

    def forward(self, images: Tensor) -> Tensor:
        return self.add_positions(self.patch_embedding(images))


class _SigLIPHead(nn.Module):
    """SigLIP's attention pooling. Never run: it is here because it is in the state dict."""

    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.attention = nn.MultiheadAttention(shape.width, shape.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.mlp = ViTMlp(shape)


class _Trunk(nn.Module):
    """Embeddings, blocks and final norm under the names of DINOv2 and MAE checkpoints."""

    def __init__(self, embeddings: _Embeddings, layers: Iterable[nn.Module], norm: nn.Module):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.layernorm = norm

    def forward(self, images: Tensor) -> Tensor:
        return self.layernorm(_through(self.encoder["layer"], self.embeddings(images)))


class _SigLIPTrunk(nn.Module):
    """Embeddings, blocks, final norm and head under the names of SigLIP checkpoints."""

    def __init__(
        self, embeddings: _Embeddings, layers: Iterable[nn.Module], norm: nn.Module, head: nn.Module
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = norm
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.post_layernorm(_through(self.encoder["layers"], self.embeddings(images)))


class FrozenEncoder(nn.Module):
    """What the three encoders share: always in eval mode, never trained, patch tokens out.

    Attributes:
        hidden_size: width of a token.
        patch_size: side of a patch in pixels.
    """

    def __init__(self, trunk_name: str, trunk: _Trunk | _SigLIPTrunk, config: Any) -> None:
        super().__init__()
        self.hidden_size: int = config.hidden_size
        self.patch_size = _side(config.patch_size, "patch_size")
        self._trunk_name = trunk_name
        self.add_module(trunk_name, trunk)
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to patch tokens (B, N, hidden_size), row-major."""
        trunk = self._trunk()
        return trunk(images)[:, trunk.embeddings.num_extra_tokens :]

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode whatever is asked."""
        return super().train(False)

    def _trunk(self) -> _Trunk | _SigLIPTrunk:
        return cast("_Trunk | _SigLIPTrunk", self.get_submodule(self._trunk_name))

    def _prepare(self, folder: str, input_size: int | None, anchor: str, image_size: Any) -> None:
        """Load the weights (none on the meta device) and resample the positions."""
        trunk = self._trunk()
        side = (input_size or _side(image_size, "image_size")) // self.patch_size
        trunk.embeddings.grid = (side, side)
        if is_meta(self):
            trunk.embeddings.resample((side, side))
        else:
            load_strict(trunk, _trunk_weights(folder, trunk, anchor), f"the encoder in {folder}")


class DINOv2Encoder(FrozenEncoder):
    """DINOv2 with registers, published as ``Dinov2withNorm`` (Oquab 2023, Darcet 2024).

    Args:
        dinov2_path: local model folder or hub id.
        normalize: leave the affine map of the final norm out, as RAE does.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self, dinov2_path: str, normalize: bool = True, input_size: int | None = None
    ) -> None:
        config = Dinov2WithRegistersConfig(**_config(dinov2_path, ("dinov2_with_registers",)))
        shape = ViTShape(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=int(config.hidden_size * config.mlp_ratio),
            norm_eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            activation=config.hidden_act,
        )
        layers = (
            DINOv2Layer(shape, use_swiglu=config.use_swiglu_ffn)
            for _ in range(config.num_hidden_layers)
        )
        trunk = _Trunk(
            _TokenEmbeddings(config, config.num_register_tokens),
            layers,
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=not normalize),
        )
        super().__init__("encoder", trunk, config)
        self._prepare(dinov2_path, input_size, "embeddings.cls_token", config.image_size)


class MAEEncoder(FrozenEncoder):
    """The encoder of ViT-MAE without masking, published as ``MAEwNorm`` (He et al. 2022).

    Args:
        model_name: local model folder or hub id.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self, model_name: str = "facebook/vit-mae-base", input_size: int | None = None
    ) -> None:
        config = ViTMAEConfig(**_config(model_name, ("vit_mae",)))
        shape = ViTShape(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            activation=config.hidden_act,
        )
        trunk = _Trunk(
            _TokenEmbeddings(config, None),
            (ViTMAELayer(shape) for _ in range(config.num_hidden_layers)),
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=False),
        )
        super().__init__("model", trunk, config)
        self._prepare(model_name, input_size, "embeddings.cls_token", config.image_size)


class SigLIP2Encoder(FrozenEncoder):
    """SigLIP2's vision tower, published as ``SigLIP2wNorm`` (Tschannen et al. 2025).

    Args:
        model_name: local model folder or hub id of a fixed-resolution SigLIP or SigLIP2 model.
        num_tokens: accepted because published files give it; the grid decides.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self, model_name: str, num_tokens: int | None = None, input_size: int | None = None
    ) -> None:
        values = _config(model_name, ("siglip", "siglip_vision_model"))
        config = SiglipVisionConfig(**values.get("vision_config", values))
        shape = ViTShape(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            activation=config.hidden_act,
        )
        trunk = _SigLIPTrunk(
            _PatchEmbeddings(config),
            (SigLIPLayer(shape) for _ in range(config.num_hidden_layers)),
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=False),
            _SigLIPHead(shape),
        )
        super().__init__("model", trunk, config)
        self._prepare(
            model_name, input_size, "embeddings.patch_embedding.weight", config.image_size
        )


def image_mean_std(folder: str) -> tuple[list[float], list[float]]:
    """Read the mean and standard deviation a model's images are normalised with, per channel.

    Raises:
        UserError: if the folder has no image-processor configuration, or one without them.
    """
    values = read_json(folder, "preprocessor_config.json")
    if values is None:  # transformers 5 writes it as one part of a processor
        values = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    if not values or not {"image_mean", "image_std"} <= values.keys():
        raise UserError(
            f"{folder} has no preprocessor_config.json with image_mean and image_std, so the "
            "encoder's image normalisation is unknown; save the model's image processor there too"
        )
    return values["image_mean"], values["image_std"]


def _config(folder: str, model_types: tuple[str, ...]) -> dict[str, Any]:
    values = read_json(folder, "config.json")
    if values is None:
        raise UserError(f"the encoder folder {folder} has no config.json")
    if values.get("model_type") not in model_types:
        raise UserError(
            f"the encoder in {folder} has model_type {values.get('model_type')!r}, but this "
            f"encoder_cls reads {' or '.join(model_types)}; choose the encoder_cls that fits"
        )
    return values


def _trunk_weights(folder: str, trunk: nn.Module, anchor: str) -> dict[str, Tensor]:
    """Read the weights of the vision trunk, wherever in the saved model it sits."""
    weights = read_weights(folder)
    prefix = next((k.removesuffix(anchor) for k in weights if k.endswith(anchor)), None)
    if prefix is None:
        raise UserError(
            f"the weights in {folder} have no {anchor}; this is not a model of this kind"
        )
    own = trunk.state_dict().keys()
    inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    # Heads, decoders and the final norm's affine map may lie beside the trunk; blocks may not.
    trunk_parts = ("embeddings.", "encoder.")
    extra = ("embeddings.position_ids",)
    return {
        k: v
        for k, v in inside.items()
        if k in own or (k.startswith(trunk_parts) and k not in extra)
    }


def _side(value: int | Iterable[int], what: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise UserError(f"encoder configuration: {what} must be square, got {value}")
    return sides.pop()


def _through(layers: nn.Module, x: Tensor) -> Tensor:
    for layer in layers.children():
        x = layer(x)
    return x
