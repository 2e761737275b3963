"""The keywords of the models a configuration may name, so that a slip is found before a build.

``tests/test_registry.py`` holds these to the signatures of the classes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from rae_xla.config.sections import ModelSpec
from rae_xla.config.targets import full_name
from rae_xla.config.typed import Origin, build
from rae_xla.errors import UserError


@dataclass(frozen=True)
class RAEParams:
    """Keywords of the autoencoder (``stage_1.params``)."""

    encoder_cls: Annotated[str, "`Dinov2withNorm`, `SigLIP2wNorm` or `MAEwNorm`"] = "Dinov2withNorm"
    encoder_config_path: Annotated[str, "Hugging Face folder or hub id of the encoder"] = (
        "facebook/dinov2-with-registers-base"
    )
    encoder_input_size: Annotated[int, "side in pixels that images are resized to"] = 224
    encoder_params: Annotated[dict[str, Any], "`dinov2_path` or `model_name`, and `normalize`"] = (
        field(default_factory=dict)
    )
    decoder_config_path: Annotated[
        str | dict[str, Any], "folder of the decoder's vit_mae config.json, or its settings"
    ] = "configs/decoder/ViTXL"
    decoder_patch_size: Annotated[int, "side of the pixels a token becomes"] = 16
    pretrained_decoder_path: Annotated[str | None, "weights of the decoder"] = None
    noise_tau: Annotated[float, "latent noise while training (0.8); 0 is none"] = 0.8
    reshape_to_2d: Annotated[bool, "latents as C x H x W, not as tokens"] = True
    normalization_stat_path: Annotated[str | None, "latent statistics (`rae-xla stats`)"] = None
    eps: Annotated[float, "added to the variance of the statistics"] = 1e-5


@dataclass(frozen=True)
class DiTDHParams:
    """Keywords of DiT-DH (``stage_2.params``); pairs are for the encoder and the head."""

    input_size: Annotated[int, "side of a latent"] = 16
    patch_size: Annotated[int | tuple[int, int], "latent cells per token side"] = 1
    in_channels: Annotated[int, "channels of a latent"] = 768
    hidden_size: Annotated[tuple[int, int], "widths"] = (1152, 2048)
    depth: Annotated[tuple[int, int], "numbers of blocks"] = (28, 2)
    num_heads: Annotated[int | tuple[int, int], "attention heads"] = (16, 16)
    mlp_ratio: Annotated[float, "width of an MLP over the block's"] = 4.0
    class_dropout_prob: Annotated[float, "share of labels replaced by the null label"] = 0.1
    num_classes: Annotated[int, "classes, without the null label"] = 1000
    use_qknorm: Annotated[bool, "normalise queries and keys"] = False
    use_swiglu: Annotated[bool, "SwiGLU, not GELU"] = True
    use_rope: Annotated[bool, "rotary position embedding"] = True
    use_rmsnorm: Annotated[bool, "RMSNorm, not LayerNorm"] = True
    wo_shift: Annotated[bool, "modulate without a shift"] = False
    use_pos_embed: Annotated[bool, "sin-cos position embedding"] = True


@dataclass(frozen=True)
class LightningDiTParams:
    """Keywords of the plain DiT (``stage_2.params``)."""

    input_size: Annotated[int, "side of a latent"] = 16
    patch_size: Annotated[int, "latent cells per token side"] = 1
    in_channels: Annotated[int, "channels of a latent"] = 768
    hidden_size: Annotated[int, "width"] = 1152
    depth: Annotated[int, "number of blocks"] = 28
    num_heads: Annotated[int, "attention heads"] = 16
    mlp_ratio: Annotated[float, "width of an MLP over the block's"] = 4.0
    class_dropout_prob: Annotated[float, "share of labels replaced by the null label"] = 0.1
    num_classes: Annotated[int, "classes, without the null label"] = 1000
    learn_sigma: Annotated[bool, "twice the output channels"] = False
    use_qknorm: Annotated[bool, "normalise queries and keys"] = False
    use_swiglu: Annotated[bool, "SwiGLU, not GELU"] = True
    use_rope: Annotated[bool, "rotary position embedding"] = True
    use_rmsnorm: Annotated[bool, "RMSNorm, not LayerNorm"] = True
    wo_shift: Annotated[bool, "modulate without a shift"] = False
    use_gembed: Annotated[bool, "Fourier time embedding, not sin-cos"] = True


AUTOENCODERS = {"rae_xla.models.rae.RAE": RAEParams}
DENOISERS: dict[str, type[DiTDHParams | LightningDiTParams]] = {
    "rae_xla.models.dit_dh.DiTDH": DiTDHParams,
    "rae_xla.models.dit.LightningDiT": LightningDiTParams,
}


def autoencoder_params(spec: ModelSpec, key: str, origin: Origin) -> RAEParams:
    """Check and complete the params of ``stage_1``."""
    return build(_schema(spec, key, AUTOENCODERS, origin), spec.params, origin, f"{key}.params.")


def denoiser_params(spec: ModelSpec, key: str, origin: Origin) -> DiTDHParams | LightningDiTParams:
    """Check and complete the params of ``stage_2`` or of the guidance model."""
    return build(_schema(spec, key, DENOISERS, origin), spec.params, origin, f"{key}.params.")


def _schema(spec: ModelSpec, key: str, valid: dict[str, Any], origin: Origin) -> Any:
    where = f"{key}.target ({origin.of(key + '.target')})"
    try:
        name = full_name(spec.target)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if name not in valid:
        names = " or ".join(n.rsplit(".", 1)[-1] for n in valid)
        raise UserError(f"{where}: expected {names}, got {spec.target}")
    return valid[name]
