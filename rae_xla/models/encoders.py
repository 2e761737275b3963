"""The frozen encoders: DINOv2 with registers, SigLIP2 and MAE vision transformers.

Configurations are read by transformers and weights come from any Hugging Face folder or hub id.
The forward pass is our own: parameter names are those of the published checkpoints whatever the
transformers version, positions are resampled once instead of in every forward (XLA has no bicubic
resize), and MAE does not sort its tokens to keep them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.vit import DINOv2Layer, SigLIPLayer, ViTMAELayer, ViTShape
from rae_xla.models.vit_trunk import (
    PatchEmbeddings,
    SigLIPHead,
    SigLIPTrunk,
    TokenEmbeddings,
    ViTTrunk,
    square_side,
)
from rae_xla.models.weights import is_meta, load_strict


class FrozenEncoder(nn.Module):
    """What the three encoders share: always in eval mode, never trained, patch tokens out.

    Attributes:
        hidden_size: width of a token.
        patch_size: side of a patch in pixels.
        config: the model's configuration as transformers writes it; with it, and nothing but it,
            the encoder can be built on the meta device.
    """

    def __init__(self, trunk_name: str, trunk: ViTTrunk | SigLIPTrunk, config: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = config.to_dict()
        self.hidden_size: int = config.hidden_size
        self.patch_size = square_side(config.patch_size, "patch_size")
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

    def _trunk(self) -> ViTTrunk | SigLIPTrunk:
        return cast("ViTTrunk | SigLIPTrunk", self.get_submodule(self._trunk_name))

    def _prepare(
        self,
        folder: str | Mapping[str, Any],
        input_size: int | None,
        anchor: str,
        image_size: Any,
    ) -> None:
        """Load the weights (none on the meta device) and resample the positions."""
        trunk = self._trunk()
        side = (input_size or square_side(image_size, "image_size")) // self.patch_size
        if side < 1:
            raise UserError(
                f"encoder_input_size {input_size} is smaller than a patch of {self.patch_size}"
            )
        trunk.embeddings.grid = (side, side)
        if is_meta(self):
            trunk.embeddings.resample((side, side))
        elif isinstance(folder, Mapping):
            raise UserError(
                "an encoder given by its configuration has no weights: give a model folder, or "
                "build it on the meta device and load them"
            )
        else:
            load_strict(trunk, _trunk_weights(folder, trunk, anchor), f"the encoder in {folder}")


class DINOv2Encoder(FrozenEncoder):
    """DINOv2 with registers, published as ``Dinov2withNorm`` (Oquab 2023, Darcet 2024).

    Args:
        dinov2_path: local model folder or hub id; or, on the meta device, the configuration.
        normalize: leave the affine map of the final norm out, as RAE does.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self,
        dinov2_path: str | Mapping[str, Any],
        normalize: bool = True,
        input_size: int | None = None,
    ) -> None:
        values = _config(dinov2_path, ("dinov2_with_registers",))
        config = _parsed(Dinov2WithRegistersConfig, values, dinov2_path)
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
        trunk = ViTTrunk(
            TokenEmbeddings(config, config.num_register_tokens),
            layers,
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=not normalize),
        )
        super().__init__("encoder", trunk, config)
        self._prepare(dinov2_path, input_size, "embeddings.cls_token", config.image_size)


class MAEEncoder(FrozenEncoder):
    """The encoder of ViT-MAE without masking, published as ``MAEwNorm`` (He et al. 2022).

    Args:
        model_name: local model folder or hub id; or, on the meta device, the configuration.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any] = "facebook/vit-mae-base",
        input_size: int | None = None,
    ) -> None:
        config = _parsed(ViTMAEConfig, _config(model_name, ("vit_mae",)), model_name)
        shape = ViTShape(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            activation=config.hidden_act,
        )
        trunk = ViTTrunk(
            TokenEmbeddings(config, None),
            (ViTMAELayer(shape) for _ in range(config.num_hidden_layers)),
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=False),
        )
        super().__init__("model", trunk, config)
        self._prepare(model_name, input_size, "embeddings.cls_token", config.image_size)


class SigLIP2Encoder(FrozenEncoder):
    """SigLIP2's vision tower, published as ``SigLIP2wNorm`` (Tschannen et al. 2025).

    Args:
        model_name: local model folder or hub id of a fixed-resolution SigLIP or SigLIP2 model; or,
            on the meta device, its configuration.
        num_tokens: accepted because published files give it; the grid decides.
        input_size: side of the images to come, in pixels; positions are made ready for it.

    Raises:
        UserError: if the folder is missing, holds another kind of model, or its weights do not fit.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any],
        num_tokens: int | None = None,
        input_size: int | None = None,
    ) -> None:
        values = _config(model_name, ("siglip", "siglip_vision_model"))
        config = _parsed(SiglipVisionConfig, values.get("vision_config", values), model_name)
        shape = ViTShape(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            activation=config.hidden_act,
        )
        trunk = SigLIPTrunk(
            PatchEmbeddings(config),
            (SigLIPLayer(shape) for _ in range(config.num_hidden_layers)),
            nn.LayerNorm(shape.width, eps=shape.norm_eps, elementwise_affine=False),
            SigLIPHead(shape),
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


def _config(folder: str | Mapping[str, Any], model_types: tuple[str, ...]) -> dict[str, Any]:
    values = dict(folder) if isinstance(folder, Mapping) else read_json(folder, "config.json")
    if values is None:
        raise UserError(f"the encoder folder {folder} has no config.json")
    if values.get("model_type") not in model_types:
        raise UserError(
            f"the encoder in {folder} has model_type {values.get('model_type')!r}, but this "
            f"encoder_cls reads {' or '.join(model_types)}; choose the encoder_cls that fits"
        )
    return values


def _parsed(config_class: Any, values: dict[str, Any], folder: str | Mapping[str, Any]) -> Any:
    """Let transformers fill in the defaults that a config.json leaves out."""
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the config.json of {folder} is not valid: {reason}") from error


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
