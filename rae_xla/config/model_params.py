"""Keyword arguments of the configurable models, to validate ``params`` without importing torch.

``tests/interop/test_instantiate.py`` compares them with the signatures of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from rae_xla.config.free_form import check_encoder_params
from rae_xla.config.paths import ANYWHERE, LOCAL, LOCAL_OR_HUB
from rae_xla.config.ranges import COUNT, FINITE, FRACTION, Range
from rae_xla.config.registry import full_name, register_target
from rae_xla.config.schema import ModelSpec
from rae_xla.config.typed import Origin, build
from rae_xla.errors import UserError


@dataclass(frozen=True)
class RAEParams:
    """Keyword arguments of the autoencoder (``stage_1.params``)."""

    encoder_cls: Annotated[
        str,
        "`Dinov2withNorm`, `SigLIP2wNorm`, `MAEwNorm`, `DINOv3Encoder`, `WebSSLEncoder` or"
        " `HFVisionEncoder`",
    ] = "Dinov2withNorm"
    encoder_config_path: Annotated[
        str, "Hugging Face folder or hub id of the encoder", LOCAL_OR_HUB
    ] = "facebook/dinov2-with-registers-base"
    encoder_input_size: Annotated[
        int, "side in pixels of the images that the encoder receives", COUNT
    ] = 224
    encoder_params: Annotated[
        dict[str, Any],
        "arguments of that class: `dinov2_path` or `model_name`, `normalize`, `layers`, `fusion`,"
        " `token_mean`, …",
        FINITE,
    ] = field(default_factory=dict)
    decoder_config_path: Annotated[
        str | dict[str, Any],
        "folder of the decoder's config.json (`vit_mae`), or its content",
        FINITE,
        LOCAL,
    ] = "configs/decoder/ViTXL"
    decoder_patch_size: Annotated[
        int, "side in pixels of the patch that a token is decoded to", COUNT
    ] = 16
    pretrained_decoder_path: Annotated[str | None, "weights of the decoder", ANYWHERE] = None
    noise_tau: Annotated[
        float,
        "scale of the noise added to latents in decoder training; 0: none",
        Range(least=0, most=1000),
    ] = 0.8
    reshape_to_2d: Annotated[bool, "return latents as C x H x W instead of tokens"] = True
    normalization_stat_path: Annotated[
        str | None, "file of latent statistics (`rae-xla stats`)", LOCAL
    ] = None
    eps: Annotated[
        float, "added to the variance of the statistics for numerical stability", FRACTION
    ] = 1e-5
    decoder_output: Annotated[
        Literal["normalized", "pixels"],
        "the decoder predicts images normalised like the encoder's, or pixels in [0, 1] (RAEv2)",
    ] = "normalized"
    image_mean: Annotated[
        tuple[float, float, float] | None,
        "mean of the encoder's image normalisation; default: that in the encoder's folder",
        Range(least=-1000, most=1000),
    ] = None
    image_std: Annotated[
        tuple[float, float, float] | None,
        "standard deviation of that normalisation",
        Range(above=0, most=1000),
    ] = None


@dataclass(frozen=True)
class _DiTParams:
    """Keyword arguments of both diffusion transformers."""

    input_size: Annotated[int, "side of the latent (H = W)", COUNT] = 16
    in_channels: Annotated[int, "channels of the latent", COUNT] = 768
    mlp_ratio: Annotated[
        float, "hidden width of an MLP relative to the block's width", Range(above=0, most=1000)
    ] = 4.0
    class_dropout_prob: Annotated[
        float, "probability that a label is replaced by the null label in training", FRACTION
    ] = 0.1
    num_classes: Annotated[int, "number of classes, without the null label", COUNT] = 1000
    use_qknorm: Annotated[bool, "normalise queries and keys"] = False
    use_swiglu: Annotated[bool, "SwiGLU instead of GELU"] = True
    use_rope: Annotated[bool, "rotary position embedding"] = True
    use_rmsnorm: Annotated[bool, "RMSNorm instead of LayerNorm"] = True
    wo_shift: Annotated[bool, "adaLN modulation without a shift"] = False
    use_pos_embed: Annotated[bool, "sin-cos position embedding"] = True
    conditioning: Annotated[
        Literal["adaln", "tokens"],
        "time and label modulate the blocks, or are tokens that the blocks attend to",
    ] = "adaln"
    num_t_tokens: Annotated[int, "conditioning by tokens: number of time tokens", COUNT] = 4
    num_c_tokens: Annotated[int, "conditioning by tokens: number of label tokens", COUNT] = 8
    base_model_depth: Annotated[
        int | None, "block that the base head reads, counted from 1; null: no base head", COUNT
    ] = None
    repa_layer_depth: Annotated[
        int | None, "block that the REPA projection reads, counted from 1; null: none", COUNT
    ] = None
    z_dim: Annotated[int | None, "channels of the encoder that REPA aligns with", COUNT] = None


@dataclass(frozen=True)
class DiTDHParams(_DiTParams):
    """Keyword arguments of DiT-DH (``stage_2.params``). Pairs are (encoder, head)."""

    patch_size: Annotated[int | tuple[int, int], "side of a token in latent positions", COUNT] = 1
    hidden_size: Annotated[tuple[int, int], "widths", COUNT] = (1152, 2048)
    depth: Annotated[tuple[int, int], "numbers of blocks", COUNT] = (28, 2)
    num_heads: Annotated[int | tuple[int, int], "attention heads", COUNT] = (16, 16)


@dataclass(frozen=True)
class LightningDiTParams(_DiTParams):
    """Keyword arguments of the plain DiT (``stage_2.params``)."""

    patch_size: Annotated[int, "side of a token in latent positions", COUNT] = 1
    hidden_size: Annotated[int, "width", COUNT] = 1152
    depth: Annotated[int, "number of blocks", COUNT] = 28
    num_heads: Annotated[int, "attention heads", COUNT] = 16
    learn_sigma: Annotated[
        bool, "twice the output channels, of which the first half is used (published key)"
    ] = False
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
    schema = _schema(spec, key, AUTOENCODERS, origin)
    params: RAEParams = build(schema, spec.params, origin, f"{key}.params.")
    encoder = check_encoder_params(params.encoder_params, f"{key}.params.encoder_params", origin)
    return replace(params, encoder_params=encoder)


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
