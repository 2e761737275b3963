"""Completion of a configuration from its models, and checks for contradictory settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rae_xla.config.free_form import check_encoder_params, check_names
from rae_xla.config.geometry import latent_size
from rae_xla.config.intermediate_heads import (
    check_heads,
    check_internal_guidance,
    check_repa,
)
from rae_xla.config.model_params import (
    DiTDHParams,
    LightningDiTParams,
    RAEParams,
    autoencoder_params,
    denoiser_params,
)
from rae_xla.config.run import RunConfig, to_plain
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError


def complete(config: RunConfig, given: Mapping[str, Any], origin: Origin) -> RunConfig:
    """Fill in the models' params, and the keys of misc and data that follow from them.

    Args:
        config: as built from ``given``.
        given: settings of the file and the command line; keys that are set there are kept.
        origin: for error messages.
    """
    rae, denoiser = _models(config, origin)
    config = _with_params(config, rae, denoiser)
    misc, data, training = config.misc, config.data, config.training
    if training.clip_grad is not None and training.clip_grad < 0:
        # Published files switch clipping off with any number that is not positive.
        training = replace(training, clip_grad=0.0)
    latents = latent_size(rae, origin) if rae else None
    if misc.latent_size is None:
        side = denoiser.input_size if denoiser else 0
        input_size = (denoiser.in_channels, side, side) if denoiser else None
        misc = replace(misc, latent_size=latents or input_size)
    if misc.time_dist_shift_dim is None and misc.latent_size:
        misc = replace(misc, time_dist_shift_dim=math.prod(misc.latent_size))
    given_misc = given.get("misc") or {}
    if given_misc.get("num_classes") is None and denoiser:
        misc = replace(misc, num_classes=denoiser.num_classes)
    if given_misc.get("null_label") is None:
        misc = replace(misc, null_label=misc.num_classes)
    if (given.get("data") or {}).get("image_size") is None and rae and latents:
        data = replace(data, image_size=rae.decoder_patch_size * latents[1])
    repa = config.repa
    if repa is not None:
        encoder = check_encoder_params(repa.encoder_params, "repa.encoder_params", origin)
        repa = replace(repa, encoder_params=encoder)
    return replace(config, misc=misc, data=data, training=training, repa=repa)


def _with_params(config: RunConfig, rae: Any, denoiser: Any) -> RunConfig:
    """Return the configuration with the full params of its models, defaults included."""
    if config.stage_1:
        config = replace(config, stage_1=replace(config.stage_1, params=to_plain(asdict(rae))))
    if config.stage_2:
        config = replace(config, stage_2=replace(config.stage_2, params=to_plain(asdict(denoiser))))
    return config


def validate(config: RunConfig, origin: Origin) -> None:
    """Raise ``UserError`` if settings contradict each other."""
    rae, denoiser = _models(config, origin)
    _check_numbers(config, origin)
    check_names(config, origin)
    if rae:
        _check_latent(config, rae, denoiser, origin)
    if denoiser:
        _check_multiples(denoiser, origin)
        _check_tensor_axis(config, denoiser, origin)
        _check_labels(config, denoiser, origin)
        check_heads(denoiser, origin)
        check_repa(config, denoiser, origin)
        _check_guidance(config, denoiser, origin)
    _check_time(config, origin)
    _check_gan(config, origin)
    _check_eval(config, origin)


def _models(
    config: RunConfig, origin: Origin
) -> tuple[RAEParams | None, DiTDHParams | LightningDiTParams | None]:
    rae, denoiser = config.stage_1, config.stage_2
    return (
        autoencoder_params(rae, "stage_1", origin) if rae else None,
        denoiser_params(denoiser, "stage_2", origin) if denoiser else None,
    )


def _fail(key: str, origin: Origin, reason: str) -> None:
    raise UserError(f"{key} ({origin.describe(key)}): {reason}")


def _check_numbers(config: RunConfig, origin: Origin) -> None:
    flat = config.flat()
    training = config.training
    if (steps := training.profile_steps) is not None and steps[0] > steps[1]:
        _fail(
            "training.profile_steps",
            origin,
            f"expected the first and the last step, counted from 1, got {list(steps)}",
        )
    optimizer, base_lr = training.optimizer, training.scheduler.base_lr
    rate = optimizer.lr if base_lr is None else base_lr
    if optimizer.type == "muon" and optimizer.adamw_lr is not None and rate == 0:
        key = "training.optimizer.adamw_lr"
        _fail(key, origin, "it is proportional to the rate of the matrices, which is 0: set that")
    batch, parts = training.global_batch_size, training.grad_accum_steps
    if batch is not None and batch % parts:
        _fail(
            "training.grad_accum_steps",
            origin,
            f"{parts} does not divide training.global_batch_size {batch}",
        )
    axes = [key for key in flat if key.startswith(("mesh.ici.", "mesh.dcn."))]
    if len(open_axes := [key for key in axes if flat[key] == -1]) > 1:
        _fail(open_axes[0], origin, f"only one of {' and '.join(open_axes)} may be -1")
    if config.sampler.params.reverse:
        _fail("sampler.params.reverse", origin, "only false is supported")


def _check_latent(
    config: RunConfig,
    rae: RAEParams,
    denoiser: DiTDHParams | LightningDiTParams | None,
    origin: Origin,
) -> None:
    from_encoder = latent_size(rae, origin)
    configured = config.misc.latent_size
    reason = (
        f"the encoder's latents for stage_1.params.encoder_input_size {rae.encoder_input_size} are"
        f" {list(from_encoder)} (C, H, W)"
        if from_encoder
        else f"misc.latent_size is {list(configured or ())}"
    )
    latents = from_encoder or configured
    if latents is None:
        return
    channels, side, _ = latents
    wanted: dict[str, tuple[object, object]] = {}
    if configured != latents and configured is not None:
        wanted["misc.latent_size"] = (list(configured), list(latents))
    if denoiser:
        if denoiser.input_size != side:
            wanted["stage_2.params.input_size"] = (denoiser.input_size, side)
        if denoiser.in_channels != channels:
            wanted["stage_2.params.in_channels"] = (denoiser.in_channels, channels)
    if wanted:
        dim = math.prod(latents)
        wrong = ", ".join(f"{k} is {was}" for k, (was, _) in wanted.items())
        right = ", ".join(f"{k}: {now}" for k, (_, now) in wanted.items())
        if config.misc.time_dist_shift_dim != dim:
            right += f", misc.time_dist_shift_dim: {dim}"
        _fail(next(iter(wanted)), origin, f"{wrong}, but {reason}. Write {right}")
    if denoiser and not rae.reshape_to_2d:
        _fail(
            "stage_1.params.reshape_to_2d", origin, "stage 2 needs latents as C x H x W: write true"
        )
    decoded = rae.decoder_patch_size * side
    if denoiser is None and from_encoder and config.data.image_size != decoded:
        _fail(
            "data.image_size",
            origin,
            f"{config.data.image_size}, but {reason}, which the decoder (decoder_patch_size"
            f" {rae.decoder_patch_size}) decodes to images of {decoded} px: write {decoded}, so"
            " that images and reconstructions have the same size",
        )


def _check_multiples(denoiser: DiTDHParams | LightningDiTParams, origin: Origin) -> None:
    """Check that heads divide widths, and tokens the latent, for each part of the model."""
    for whole, part in (("hidden_size", "num_heads"), ("input_size", "patch_size")):
        if not hasattr(denoiser, whole) or not hasattr(denoiser, part):
            continue  # a registered denoiser need not have them
        wholes, parts = (_pair(getattr(denoiser, name)) for name in (whole, part))
        for size, divisor in zip(wholes, parts, strict=True):
            if size % divisor:
                _fail(
                    f"stage_2.params.{whole}",
                    origin,
                    f"expected a multiple of stage_2.params.{part} {divisor}, got {size}",
                )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _check_tensor_axis(
    config: RunConfig, denoiser: DiTDHParams | LightningDiTParams, origin: Origin
) -> None:
    size = config.mesh.ici.tensor
    for name in ("hidden_size", "num_heads") if size > 1 else ():
        value = getattr(denoiser, name)
        if any(width % size for width in (value if isinstance(value, tuple) else (value,))):
            _fail(
                "mesh.ici.tensor",
                origin,
                f"{size} does not divide stage_2.params.{name} {to_plain(value)}: tensor"
                " parallelism splits attention by heads and layers by their width. Write a size"
                " that divides both",
            )


def _check_labels(
    config: RunConfig, denoiser: DiTDHParams | LightningDiTParams, origin: Origin
) -> None:
    sampled, null, trained = config.misc.num_classes, config.misc.null_label, denoiser.num_classes
    if sampled > trained:
        _fail("misc.num_classes", origin, f"{sampled}, but stage_2.params.num_classes is {trained}")
    if null != trained:
        hint = f"write misc.num_classes: {trained}" if null == sampled else f"write {trained}"
        _fail(
            "misc.num_classes" if null == sampled else "misc.null_label",
            origin,
            f"the null label would be {null}, but stage_2.params.num_classes is {trained} and the"
            f" null label must follow the last class: {hint} (to sample fewer classes, also set"
            f" misc.null_label: {trained})",
        )


def _check_guidance(
    config: RunConfig, denoiser: DiTDHParams | LightningDiTParams, origin: Origin
) -> None:
    guidance = config.guidance
    if guidance.t_min >= guidance.t_max:
        _fail(
            "guidance.t_min",
            origin,
            f"expected t_min < t_max, got {guidance.t_min} and {guidance.t_max}",
        )
    if guidance.method == "internal":
        check_internal_guidance(config, denoiser, origin)
        return
    if guidance.method == "cfg":
        if guidance.scale > 1 and denoiser.class_dropout_prob <= 0:
            _fail(
                "guidance.method",
                origin,
                "cfg needs a null label, but stage_2.params.class_dropout_prob 0 trains none",
            )
        return
    if guidance.guidance_model is None:
        _fail(
            "guidance.guidance_model",
            origin,
            "method autoguidance needs a weaker model: set its target, params and ckpt",
        )
        return
    guide = denoiser_params(guidance.guidance_model, "guidance.guidance_model", origin)
    for name in ("input_size", "in_channels", "num_classes"):
        expected, found = getattr(denoiser, name), getattr(guide, name)
        if found != expected:
            _fail(
                f"guidance.guidance_model.params.{name}",
                origin,
                f"{found}, but stage_2.params.{name} is {expected}: both models receive the same"
                " latents and labels",
            )


def _check_time(config: RunConfig, origin: Origin) -> None:
    misc = config.misc
    dim = math.prod(misc.latent_size) if misc.latent_size else misc.time_dist_shift_dim
    if misc.time_dist_shift_dim != dim:
        _fail(
            "misc.time_dist_shift_dim",
            origin,
            f"{misc.time_dist_shift_dim}, but misc.latent_size {list(misc.latent_size or ())} has"
            f" {dim} elements. Remove this key; the base selects the shift sqrt(dim / base): for"
            f" {config.time_dist_shift:.4g} write misc.time_dist_shift_base:"
            f" {(dim or 0) / config.time_dist_shift**2:.6g}",
        )
    if config.stage_2 and config.time_dist_shift < 1:
        _fail(
            "misc.time_dist_shift_base",
            origin,
            f"{misc.time_dist_shift_base} is larger than misc.time_dist_shift_dim"
            f" {misc.time_dist_shift_dim}: the time shift sqrt(dim / base) must be at least 1",
        )


def _check_gan(config: RunConfig, origin: Origin) -> None:
    if config.gan is None:
        return
    loss, disc = config.gan.loss, config.gan.disc
    if loss.disc_upd_start is not None and loss.disc_upd_start > loss.disc_start:
        _fail(
            "gan.loss.disc_upd_start",
            origin,
            f"epoch {loss.disc_upd_start}, but the adversarial loss starts at disc_start"
            f" {loss.disc_start}: the discriminator must be trained from then on, or earlier",
        )
    if disc.arch.norm_type not in ("bn", "gn"):
        _fail("gan.disc.arch.norm_type", origin, f"expected bn or gn, got {disc.arch.norm_type}")


RECON_METRICS = ("psnr", "ssim", "lpips", "rfid")
GEN_METRICS = ("fid", "sfid", "is", "precision", "recall", "fd_dinov2", "fdr6")


def _check_eval(config: RunConfig, origin: Origin) -> None:
    if config.eval is None:
        return
    if config.eval.metrics == ():
        _fail(
            "eval.metrics",
            origin,
            "the list is empty: to train without evaluation write eval: null",
        )
    for name in config.eval.metrics or ():
        if name not in (*RECON_METRICS, *GEN_METRICS):
            known = f"{', '.join(RECON_METRICS)} in stage 1, {', '.join(GEN_METRICS)} in stage 2"
            _fail("eval.metrics", origin, f"unknown metric {name!r}: the metrics are {known}")
