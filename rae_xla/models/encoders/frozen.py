"""Frozen encoders: DINOv2 with registers, SigLIP2 and MAE vision transformers.

transformers parses the configurations, and weights come from any Hugging Face folder or hub id.
The forward pass is ours rather than that of transformers for three reasons: parameter names match
the published checkpoints with every version of transformers; positions are resampled once instead
of in each forward pass (XLA has no bicubic resize); and MAE does not sort its tokens, of which it
keeps all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

from rae_xla.errors import UserError
from rae_xla.models.encoders.backbone import (
    Backbone,
    PatchEmbeddings,
    SigLIPBackbone,
    SigLIPHead,
    TokenEmbeddings,
    ViTBackbone,
    square_side,
)
from rae_xla.models.encoders.fusion import LayerFusion, make_fusion
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.intermediate_heads import mark_read_blocks
from rae_xla.models.vit import DINOv2Layer, SigLIPLayer, ViTBlockConfig, ViTMAELayer
from rae_xla.models.weights import is_meta, load_strict
from rae_xla.ops.normalization import LayerNorm


class FrozenEncoder(nn.Module):
    """Base class of the encoders: frozen, in eval mode, maps images to patch tokens.

    A subclass implements ``forward`` and freezes its parameters at the end of ``__init__``, with
    ``requires_grad_(False)``. The first parameter of its ``__init__`` is the model folder, and it
    accepts ``input_size``, the side of the images in pixels.

    Args:
        config: the model's configuration, from which alone the encoder can be built on the meta
            device.
        hidden_size: channels of a token.
        patch_size: side of a patch in pixels.

    Attributes:
        options: further keyword arguments that it was built with (``encoder_params``).
    """

    def __init__(self, config: Mapping[str, Any], hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.config = dict(config)
        self.options: dict[str, Any] = {}
        self.hidden_size, self.patch_size = hidden_size, patch_size
        self.train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to patch tokens (B, N, hidden_size), row by row."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)


class BackboneEncoder(FrozenEncoder):
    """An encoder around one of the vision transformers of this package.

    With a ``fusion`` it returns a combination of the normalised outputs of several blocks, and its
    state dict contains the fusion (``LayerFusion.code``).

    Args:
        backbone_name: attribute name of the backbone, which prefixes the state-dict keys.
        backbone: the vision transformer, a ``Backbone``.
        config: the model's configuration, as transformers parses it.
        fusion: the blocks to combine; None for the last one alone.

    Raises:
        UserError: the backbone does not have all blocks of the fusion.
    """

    def __init__(
        self, backbone_name: str, backbone: Any, config: Any, fusion: LayerFusion | None = None
    ) -> None:
        patch_size = square_side(config.patch_size, "patch_size")
        super().__init__(config.to_dict(), config.hidden_size, patch_size)
        self._backbone_name = backbone_name
        self.add_module(backbone_name, backbone)
        self.fusion = fusion
        if fusion is not None:
            fusion.check(len(backbone.blocks))
            self.register_buffer("fusion_code", fusion.code())
            mark_read_blocks(backbone.blocks, *(layer + 1 for layer in fusion.layers))
        self.requires_grad_(False)
        self.train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W) to patch tokens (B, N, hidden_size), row by row."""
        backbone = self._backbone()
        extra = backbone.embeddings.num_extra_tokens
        layers = self.fusion.layers if self.fusion is not None else (len(backbone.blocks) - 1,)
        outputs: dict[int, Tensor] = {}
        x = backbone.embeddings(images)
        inputs = backbone.block_inputs()
        for number, block in enumerate(backbone.blocks[: max(layers) + 1]):
            x = block(x, *inputs)
            if number in layers:
                outputs[number] = backbone.final_norm(x)[:, extra:]
        tokens = [outputs[layer] for layer in layers]
        return tokens[0] if self.fusion is None else self.fusion.combine(tokens)

    def _backbone(self) -> Backbone:
        return cast("Backbone", self.get_submodule(self._backbone_name))

    def _prepare(
        self,
        folder: str | Mapping[str, Any],
        input_size: int | None,
        anchor: str,
        image_size: Any,
    ) -> None:
        """Load the weights, except on the meta device, and resample the positions.

        Args:
            folder: local model folder or hub id; or the configuration, on the meta device.
            input_size: side of the images in pixels; by default ``image_size``.
            anchor: state-dict key by which the backbone is found in a larger model.
            image_size: the model's own image size.
        """
        backbone: Any = self._backbone()
        side = (input_size or square_side(image_size, "image_size")) // self.patch_size
        if side < 1:
            raise UserError(
                f"encoder_input_size {input_size} is smaller than a patch ({self.patch_size} "
                "pixels); choose a multiple of it"
            )
        backbone.embeddings.grid = (side, side)
        if is_meta(self):
            backbone.embeddings.resample((side, side))
        elif isinstance(folder, Mapping):
            raise UserError(
                "an encoder that is given by its configuration has no weights: give a model "
                "folder, or build the encoder on the meta device and load its weights"
            )
        else:
            weights = _read_backbone_weights(folder, backbone, anchor)
            load_strict(backbone, weights, f"the encoder in {folder}")


def dinov2_blocks(config: Any) -> tuple[ViTBlockConfig, list[DINOv2Layer]]:
    """Build the blocks that a configuration of DINOv2, with or without registers, describes.

    Returns:
        The settings that all blocks share, and the blocks.
    """
    block = ViTBlockConfig(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        mlp_width=int(config.hidden_size * config.mlp_ratio),
        norm_eps=config.layer_norm_eps,
        qkv_bias=config.qkv_bias,
        activation=config.hidden_act,
    )
    swiglu = config.use_swiglu_ffn
    return block, [DINOv2Layer(block, use_swiglu=swiglu) for _ in range(config.num_hidden_layers)]


class DINOv2Encoder(BackboneEncoder):
    """DINOv2 with registers, published as ``Dinov2withNorm`` (Oquab 2023, Darcet 2024).

    Args:
        dinov2_path: local model folder or hub id; or, on the meta device, the configuration.
        normalize: omit the affine map of the final norm, as RAE does.
        input_size: side of the expected images in pixels, for which positions are resampled.
        layers: blocks, counted from 0, whose normalised outputs are combined; None for the last
            one alone.
        fusion: ``mean`` or ``sum`` of the layers.
        token_mean: add the mean over all tokens of the last layer to every token.
        norm_eps: epsilon of the final norm; None for the model's own.

    Raises:
        UserError: if the folder is missing, contains another type of model, or its weights do not
            match.
    """

    def __init__(
        self,
        dinov2_path: str | Mapping[str, Any],
        normalize: bool = True,
        input_size: int | None = None,
        layers: Sequence[int] | None = None,
        fusion: str = "mean",
        token_mean: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        values = read_encoder_config(dinov2_path, ("dinov2_with_registers",))
        config = parse_config(Dinov2WithRegistersConfig, values, dinov2_path)
        block, blocks = dinov2_blocks(config)
        backbone = ViTBackbone(
            TokenEmbeddings(config, config.num_register_tokens),
            blocks,
            final_norm(block, norm_eps, affine=not normalize),
        )
        super().__init__("encoder", backbone, config, make_fusion(layers, fusion, token_mean))
        self._prepare(dinov2_path, input_size, "embeddings.cls_token", config.image_size)


class MAEEncoder(BackboneEncoder):
    """The encoder of ViT-MAE without masking, published as ``MAEwNorm`` (He et al. 2022).

    Args:
        model_name: local model folder or hub id; or, on the meta device, the configuration.
        input_size: side of the expected images in pixels, for which positions are resampled.
        normalize: omit the affine map of the final norm, as RAE does.
        layers: blocks, counted from 0, whose normalised outputs are combined; None for the last
            one alone.
        fusion: ``mean`` or ``sum`` of the layers.
        token_mean: add the mean over all tokens of the last layer to every token.
        norm_eps: epsilon of the final norm; None for the model's own.

    Raises:
        UserError: if the folder is missing, contains another type of model, or its weights do not
            match.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any] = "facebook/vit-mae-base",
        input_size: int | None = None,
        normalize: bool = True,
        layers: Sequence[int] | None = None,
        fusion: str = "mean",
        token_mean: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        config = parse_config(
            ViTMAEConfig, read_encoder_config(model_name, ("vit_mae",)), model_name
        )
        block = ViTBlockConfig(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            qkv_bias=config.qkv_bias,
            activation=config.hidden_act,
        )
        backbone = ViTBackbone(
            TokenEmbeddings(config, None),
            (ViTMAELayer(block) for _ in range(config.num_hidden_layers)),
            final_norm(block, norm_eps, affine=not normalize),
        )
        super().__init__("model", backbone, config, make_fusion(layers, fusion, token_mean))
        self._prepare(model_name, input_size, "embeddings.cls_token", config.image_size)


class SigLIP2Encoder(BackboneEncoder):
    """SigLIP2's vision tower, published as ``SigLIP2wNorm`` (Tschannen et al. 2025).

    Args:
        model_name: local model folder or hub id of a fixed-resolution SigLIP or SigLIP2 model; or,
            on the meta device, its configuration.
        num_tokens: ignored; published configurations contain it. The input's grid determines the
            number of tokens.
        input_size: side of the expected images in pixels, for which positions are resampled.
        normalize: omit the affine map of the final norm, as RAE does.
        layers: blocks, counted from 0, whose normalised outputs are combined; None for the last
            one alone.
        fusion: ``mean`` or ``sum`` of the layers.
        token_mean: add the mean over all tokens of the last layer to every token.
        norm_eps: epsilon of the final norm; None for the model's own.

    Raises:
        UserError: if the folder is missing, contains another type of model, or its weights do not
            match.
    """

    def __init__(
        self,
        model_name: str | Mapping[str, Any],
        num_tokens: int | None = None,
        input_size: int | None = None,
        normalize: bool = True,
        layers: Sequence[int] | None = None,
        fusion: str = "mean",
        token_mean: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        values = read_encoder_config(model_name, ("siglip", "siglip_vision_model"))
        config = parse_config(SiglipVisionConfig, values.get("vision_config", values), model_name)
        block = ViTBlockConfig(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            norm_eps=config.layer_norm_eps,
            activation=config.hidden_act,
        )
        backbone = SigLIPBackbone(
            PatchEmbeddings(config),
            (SigLIPLayer(block) for _ in range(config.num_hidden_layers)),
            final_norm(block, norm_eps, affine=not normalize),
            SigLIPHead(block),
        )
        super().__init__("model", backbone, config, make_fusion(layers, fusion, token_mean))
        self._prepare(
            model_name, input_size, "embeddings.patch_embedding.weight", config.image_size
        )


def final_norm(block: ViTBlockConfig, eps: float | None, *, affine: bool) -> LayerNorm:
    """Build the norm that follows the last block."""
    return LayerNorm(
        block.width, eps=block.norm_eps if eps is None else eps, elementwise_affine=affine
    )


def read_image_statistics(folder: str) -> tuple[list[float], list[float]]:
    """Read the mean and standard deviation, per channel, by which a model normalises images.

    Args:
        folder: local model folder or hub id.

    Raises:
        UserError: if the folder has no image-processor configuration, or an incomplete one.
    """
    values = read_json(folder, "preprocessor_config.json")
    if values is None:  # transformers 5 writes it as a section of the processor configuration
        values = (read_json(folder, "processor_config.json") or {}).get("image_processor")
    if not values or not {"image_mean", "image_std"} <= values.keys():
        raise UserError(
            f"{folder} has no preprocessor_config.json with image_mean and image_std, which "
            "define the image normalisation; save the model's image processor to this folder"
        )
    return values["image_mean"], values["image_std"]


def read_encoder_config(
    folder: str | Mapping[str, Any], model_types: tuple[str, ...]
) -> dict[str, Any]:
    """Read the configuration of an encoder, or copy a given one; check its model type."""
    values = dict(folder) if isinstance(folder, Mapping) else read_json(folder, "config.json")
    if values is None:
        raise UserError(f"the encoder folder {folder} has no config.json")
    if values.get("model_type") not in model_types:
        raise UserError(
            f"the encoder in {folder} has model_type {values.get('model_type')!r}, but this "
            f"encoder_cls requires {' or '.join(model_types)}; choose the matching encoder_cls"
        )
    return values


def parse_config(config_class: Any, values: dict[str, Any], folder: str | Mapping[str, Any]) -> Any:
    """Parse a configuration with transformers, which adds defaults for missing keys."""
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the config.json of {folder} is not valid: {reason}") from error


def _read_backbone_weights(folder: str, backbone: nn.Module, anchor: str) -> dict[str, Tensor]:
    """Read the weights of the vision backbone, at whatever depth the saved model contains it.

    Args:
        folder: local model folder or hub id.
        backbone: the module that the weights are for.
        anchor: a key of the backbone; what precedes it in the file is the backbone's prefix.
    """
    weights = read_weights(folder)
    prefix = next((k.removesuffix(anchor) for k in weights if k.endswith(anchor)), None)
    if prefix is None:
        raise UserError(
            f"the weights in {folder} have no {anchor}; choose a model that matches encoder_cls"
        )
    own = backbone.state_dict().keys()
    inside = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    # Keep unexpected embeddings and blocks, so that strict loading reports them; drop heads,
    # decoders and the affine map of the final norm.
    backbone_parts = ("embeddings.", "encoder.", "layer.")
    extra = ("embeddings.position_ids",)
    return {
        k: v
        for k, v in inside.items()
        if k in own or (k.startswith(backbone_parts) and k not in extra)
    }
