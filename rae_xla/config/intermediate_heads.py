"""Checks of the settings of a base head, of internal guidance and of REPA."""

from __future__ import annotations

from typing import Any

from rae_xla.config.run import RunConfig
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError


def check_heads(denoiser: Any, origin: Origin) -> None:
    """Raise ``UserError`` if a head reads a block that the model does not have.

    Args:
        denoiser: params of a denoiser, which may have no such heads.
        origin: for error messages.
    """
    depth = getattr(denoiser, "depth", None)
    blocks = depth[0] if isinstance(depth, tuple) else depth
    for name in ("base_model_depth", "repa_layer_depth"):
        read = getattr(denoiser, name, None)
        if read is not None and blocks is not None and read > blocks:
            kind = "blocks of the encoder" if isinstance(depth, tuple) else "blocks"
            raise UserError(
                f"stage_2.params.{name} ({origin.describe(f'stage_2.params.{name}')}): {read}, but "
                f"stage_2.params.depth gives {blocks} {kind}: write 1 to {blocks}"
            )
    if getattr(denoiser, "repa_layer_depth", None) and denoiser.z_dim is None:
        key = "stage_2.params.z_dim"
        raise UserError(
            f"{key} ({origin.describe(key)}): repa_layer_depth is set, so this must be the number "
            "of channels of the encoder that REPA aligns with, such as 768"
        )


def check_repa(config: RunConfig, denoiser: Any, origin: Origin) -> None:
    """Raise ``UserError`` if only one of the REPA loss and the model's projection is configured."""
    depth = getattr(denoiser, "repa_layer_depth", None)
    if (config.repa is None) == (depth is None):
        return
    if config.repa is None:
        key, reason = (
            "repa",
            "the model has a projection (stage_2.params.repa_layer_depth), but "
            "this section, which names the encoder to align with, is missing",
        )
        if config.stage_2 is not None and config.stage_2.ckpt is not None:
            return  # a trained model may be sampled from, or trained further without the loss
    else:
        key, reason = (
            "stage_2.params.repa_layer_depth",
            "the repa section is given, so this must "
            "be the block whose tokens are aligned, such as 8, and z_dim the encoder's channels",
        )
    raise UserError(f"{key} ({origin.describe(key)}): {reason}")


def check_internal_guidance(config: RunConfig, denoiser: Any, origin: Origin) -> None:
    """Raise ``UserError`` if the model cannot be guided as ``guidance.method: internal`` says."""
    guidance = config.guidance
    if getattr(denoiser, "base_model_depth", None) is None:
        key = "guidance.method"
        raise UserError(
            f"{key} ({origin.describe(key)}): internal guidance needs a model with a base head, "
            "but stage_2.params.base_model_depth is not set: set it to that of the model's "
            "training, or write method cfg or autoguidance"
        )
    if guidance.cfg.t_min >= guidance.cfg.t_max:
        key = "guidance.cfg.t_min"
        raise UserError(
            f"{key} ({origin.describe(key)}): expected t_min < t_max, got {guidance.cfg.t_min} and "
            f"{guidance.cfg.t_max}"
        )
    if guidance.cfg.scale > 1 and denoiser.class_dropout_prob <= 0:
        key = "guidance.cfg.scale"
        raise UserError(
            f"{key} ({origin.describe(key)}): classifier-free guidance needs a null label, but "
            "stage_2.params.class_dropout_prob 0 trains none"
        )
