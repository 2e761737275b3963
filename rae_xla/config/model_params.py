"""Keyword arguments of the configurable models, to validate ``params`` without importing torch.

``tests/interop/test_instantiate.py`` compares them with the signatures of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from rae_xla.config.registry import full_name, register_target
from rae_xla.config.schema import ModelSpec
from rae_xla.config.typed import Origin, build
from rae_xla.errors import UserError


@dataclass(frozen=True)
class RAEParams:
    """Keyword arguments of the autoencoder (``stage_1.params``)."""

    encoder_cls: Annotated[str, "`Dinov2withNorm`, `SigLIP2wNorm` or `MAEwNorm`"] = "Dinov2withNorm"
    encoder_config_path: Annotated[str, "Hugging Face folder or hub id of the encoder"] = (
        "facebook/dinov2-with-registers-base"
    )
    encoder_input_size: Annotated[int, "side in pixels of the images that the encoder receives"] = (
        224
    )
    encoder_params: Annotated[dict[str, Any], "`dinov2_path` or `model_name`, and `normalize`"] = (
        field(default_factory=dict)
    )
    decoder_config_path: Annotated[
        str | dict[str, Any], "folder of the decoder's config.json (`vit_mae`), or its content"
    ] = "configs/decoder/ViTXL"
    decoder_patch_size: Annotated[int, "side in pixels of the patch that a token is decoded to"] = (
        16
    )
    pretrained_decoder_path: Annotated[str | None, "weights of the decoder"] = None
    noise_tau: Annotated[
        float, "scale of the noise added to latents in decoder training; 0: none"
    ] = 0.8
    reshape_to_2d: Annotated[bool, "return latents as C x H x W instead of tokens"] = True
    normalization_stat_path: Annotated[
        str | None, "file of latent statistics (`rae-xla stats`)"
    ] = None
    eps: Annotated[float, "added to the variance of the statistics for numerical stability"] = 1e-5


@dataclass(frozen=True)
class DiTDHParams:
    """Keyword arguments of DiT-DH (``stage_2.params``). Pairs are (encoder, head)."""

    input_size: Annotated[int, "side of the latent (H = W)"] = 16
    patch_size: Annotated[int | tuple[int, int], "side of a token in latent positions"] = 1
    in_channels: Annotated[int, "channels of the latent"] = 768
    hidden_size: Annotated[tuple[int, int], "widths"] = (1152, 2048)
    depth: Annotated[tuple[int, int], "numbers of blocks"] = (28, 2)
    num_heads: Annotated[int | tuple[int, int], "attention heads"] = (16, 16)
    mlp_ratio: Annotated[float, "hidden width of an MLP relative to the block's width"] = 4.0
    class_dropout_prob: Annotated[
        float, "probability that a label is replaced by the null label in training"
    ] = 0.1
    num_classes: Annotated[int, "number of classes, without the null label"] = 1000
    use_qknorm: Annotated[bool, "normalise queries and keys"] = False
    use_swiglu: Annotated[bool, "SwiGLU instead of GELU"] = True
    use_rope: Annotated[bool, "rotary position embedding"] = True
    use_rmsnorm: Annotated[bool, "RMSNorm instead of LayerNorm"] = True
    wo_shift: Annotated[bool, "adaLN modulation without a shift"] = False
    use_pos_embed: Annotated[bool, "sin-cos position embedding"] = True


@dataclass(frozen=True)
class LightningDiTParams:
    """Keyword arguments of the plain DiT (``stage_2.params``)."""

    input_size: Annotated[int, "side of the latent (H = W)"] = 16
    patch_size: Annotated[int, "side of a token in latent positions"] = 1
    in_channels: Annotated[int, "channels of the latent"] = 768
    hidden_size: Annotated[int, "width"] = 1152
    depth: Annotated[int, "number of blocks"] = 28
    num_heads: Annotated[int, "attention heads"] = 16
    mlp_ratio: Annotated[float, "hidden width of an MLP relative to the block's width"] = 4.0
    class_dropout_prob: Annotated[
        float, "probability that a label is replaced by the null label in training"
    ] = 0.1
    num_classes: Annotated[int, "number of classes, without the null label"] = 1000
    learn_sigma: Annotated[
        bool, "twice the output channels, of which the first half is used (published key)"
    ] = False
    use_qknorm: Annotated[bool, "normalise queries and keys"] = False
    use_swiglu: Annotated[bool, "SwiGLU instead of GELU"] = True
    use_rope: Annotated[bool, "rotary position embedding"] = True
    use_rmsnorm: Annotated[bool, "RMSNorm instead of LayerNorm"] = True
    wo_shift: Annotated[bool, "adaLN modulation without a shift"] = False
    use_gembed: Annotated[bool, "Gaussian Fourier time embedding instead of sin-cos"] = True


AUTOENCODERS = {"rae_xla.models.rae.RAE": RAEParams}
DENOISERS: dict[str, type] = {
    "rae_xla.models.dit_dh.DiTDH": DiTDHParams,
    "rae_xla.models.dit.LightningDiT": LightningDiTParams,
}


def register_denoiser(path: str, params: type, names: Sequence[str] = ()) -> None:
    """Make a further denoiser available to ``stage_2.target``; call it before a file is loaded.

    Args:
        path: full path of its class, ``package.module.Class``.
        params: a dataclass with the keyword arguments of the class, annotated as in this module.
            It has at least ``input_size``, ``in_channels``, ``num_classes`` and
            ``class_dropout_prob``, which other sections are validated against.
        names: short names of the class.
    """
    register_target(path, names)
    DENOISERS[path] = params


def autoencoder_params(spec: ModelSpec, key: str, origin: Origin) -> RAEParams:
    """Return the params of ``stage_1`` with defaults; raise ``UserError`` if one is invalid."""
    return build(_schema(spec, key, AUTOENCODERS, origin), spec.params, origin, f"{key}.params.")


def denoiser_params(spec: ModelSpec, key: str, origin: Origin) -> DiTDHParams | LightningDiTParams:
    """Return the params of a denoiser with defaults; raise ``UserError`` if one is invalid."""
    return build(_schema(spec, key, DENOISERS, origin), spec.params, origin, f"{key}.params.")


def _schema(spec: ModelSpec, key: str, valid: dict[str, Any], origin: Origin) -> Any:
    where = f"{key}.target ({origin.describe(key + '.target')})"
    try:
        name = full_name(spec.target)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if name not in valid:
        names = " or ".join(n.rsplit(".", 1)[-1] for n in valid)
        raise UserError(f"{where}: expected {names}, got {spec.target}")
    return valid[name]
