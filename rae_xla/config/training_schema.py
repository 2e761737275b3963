"""Schema of the sections of training: the loop, evaluation, and the losses of stage 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rae_xla.config.paths import ANYWHERE, LOCAL
from rae_xla.config.ranges import (
    AVERAGE_WIDTH,
    COUNT,
    COUNT_OR_ZERO,
    EPOCHS,
    EPSILON,
    FINITE,
    FRACTION,
    FRACTION_BELOW_ONE,
    LARGEST_INTEGER,
    LEARNING_RATE,
    LOSS_WEIGHT,
    POSITIVE,
    SECONDS,
    SEED,
    Range,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices and AdamW for the other parameters."""

    type: Annotated[
        Literal["adamw", "muon"], "`muon` orthogonalises the updates of matrices (main model only)"
    ] = "adamw"
    lr: Annotated[float, "learning rate; `scheduler.base_lr` replaces it", LEARNING_RATE] = 2e-4
    betas: Annotated[tuple[float, float], "decay rates of the two moments", FRACTION_BELOW_ONE] = (
        0.9,
        0.95,
    )
    weight_decay: Annotated[
        float, "decoupled weight decay, applied to every parameter", Range(least=0, most=100)
    ] = 0.0
    eps: Annotated[float, "added to the square root of the second moment", EPSILON] = 1e-8
    momentum: Annotated[float, "Muon: decay rate of the momentum", FRACTION_BELOW_ONE] = 0.95
    nesterov: Annotated[bool, "Muon: Nesterov momentum"] = True
    adamw_lr: Annotated[
        float | None,
        "Muon: learning rate of the other parameters after the warm-up; their schedule is"
        " proportional to that of the matrices; default: the same rate",
        LEARNING_RATE,
    ] = None
    preset: Annotated[
        Literal["polar_express", "you"], "Muon: coefficients of the Newton-Schulz iteration"
    ] = "polar_express"
    newton_schulz_dtype: Annotated[
        Literal["fp32", "bf16"], "Muon: precision of the iteration's products"
    ] = "fp32"
    matrices: Annotated[
        tuple[str, ...] | None,
        "Muon: patterns of the names of the parameters that it optimises; default: every matrix",
    ] = None


@dataclass(frozen=True)
class SchedulerConfig:
    """Warm-up, then decay from base_lr to final_lr, then constant.

    ``warmup_steps`` replaces ``warmup_epochs``, ``decay_end_steps`` replaces ``decay_end_epoch``.
    """

    type: Annotated[Literal["linear", "cosine"], "shape of the decay"] = "linear"
    warmup_epochs: Annotated[
        float, "length of the warm-up in epochs; the decay starts at its end", EPOCHS
    ] = 0.0
    warmup_steps: Annotated[int | None, "the same in optimizer steps", COUNT_OR_ZERO] = None
    decay_end_epoch: Annotated[
        float | None, "epoch at which final_lr is reached; default: no decay", EPOCHS
    ] = None
    decay_end_steps: Annotated[int | None, "the same in optimizer steps", COUNT_OR_ZERO] = None
    base_lr: Annotated[
        float | None, "learning rate after the warm-up; default: `optimizer.lr`", LEARNING_RATE
    ] = None
    final_lr: Annotated[
        float | None, "learning rate after the decay; default: base_lr", LEARNING_RATE
    ] = None
    warmup_from_zero: Annotated[
        bool, "increase the rate linearly from 0 during the warm-up; otherwise hold base_lr"
    ] = False


@dataclass(frozen=True)
class PosthocEMAConfig:
    """Averages of the weights from which those of other widths are computed afterwards (EDM2)."""

    widths: Annotated[
        tuple[float, ...],
        "widths of the power-function averages to track, relative to the length of the run, such"
        " as `[0.05, 0.1]`; from the first step on; default: none",
        AVERAGE_WIDTH,
    ] = ()
    keep: Annotated[
        int,
        "number of earlier checkpoints of which these averages are kept when the rest is deleted",
        Range(least=1, most=10_000),
    ] = 32


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop of both stages."""

    epochs: Annotated[int, "passes over the training data", COUNT] = 1400
    steps: Annotated[int | None, "optimizer steps; replaces epochs", COUNT] = None
    global_batch_size: Annotated[
        int | None, "images per optimizer step, over all devices", COUNT
    ] = None
    batch_size: Annotated[
        int | None, "images per device and micro-batch, if global_batch_size is not given", COUNT
    ] = None
    grad_accum_steps: Annotated[int, "micro-batches per optimizer step", COUNT] = 1
    ema_decay: Annotated[
        float,
        "decay of the exponential moving average of the weights, per step",
        FRACTION_BELOW_ONE,
    ] = 0.9995
    posthoc_ema: PosthocEMAConfig = field(default_factory=PosthocEMAConfig)
    log_every: Annotated[int, "steps between log lines", COUNT] = 100
    checkpoint_interval: Annotated[int, "epochs between checkpoints", COUNT] = 4
    sample_every: Annotated[int, "steps between sample images; 0: none", COUNT_OR_ZERO] = 2500
    num_samples: Annotated[int, "number of sample images", COUNT] = 16
    clip_grad: Annotated[
        float | None,
        "gradient norm above which gradients are clipped; null, 0 or below: no clipping",
        FINITE,
    ] = 1.0
    skip_grad_norm: Annotated[
        float | None, "skip steps whose gradient norm before clipping exceeds this value", POSITIVE
    ] = None
    max_skipped: Annotated[
        int,
        "consecutive skipped steps (non-finite loss or gradient) after which the run rolls back to"
        " its last good checkpoint",
        COUNT,
    ] = 10
    max_rollbacks: Annotated[
        int,
        "consecutive rollbacks, without a new checkpoint in between, after which the run fails",
        COUNT_OR_ZERO,
    ] = 2
    profile_steps: Annotated[tuple[int, int] | None, "first and last step to profile", COUNT] = None
    hang_timeout: Annotated[
        float,
        "seconds without progress after which a run exits; 12 times as long during compilation,"
        " evaluation and sampling; 0: never",
        SECONDS,
    ] = 300.0
    global_seed: Annotated[int, "seed of initial weights, data order, noise and times", SEED] = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_interval: Annotated[int, "steps between evaluations", COUNT] = 5000
    eval_model: Annotated[bool, "also evaluate the weights without EMA"] = False
    data_path: Annotated[str | None, "validation shards; default: `data.val`", ANYWHERE] = None
    num_images: Annotated[
        int | None, "number of validation images, from the first; default: all", COUNT
    ] = None
    batch_size: Annotated[int, "images per batch; does not affect the metrics", COUNT] = 64
    reference_npz_path: Annotated[
        str | None, "reference images or moments of FID; default: the validation images", ANYWHERE
    ] = None
    reference: Annotated[
        str | None,
        "name of the reference statistics in logs and reports, such as `ADM` or `JiT`; default:"
        " that of a file with a published name",
    ] = None
    fdr6_reference: Annotated[
        str | None,
        "stage 2: folder with the six published files of statistics for `fdr6`; default: the images"
        " of the reference",
        LOCAL,
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        "stage 1: `psnr`, `ssim`, `lpips`, `rfid` (default: all but `lpips`); stage 2: `fid`,"
        " `sfid`, `is`, `precision`, `recall`, `fd_dinov2`, `fdr6` (default: `fid`, `is`)",
    ] = None
    num_samples: Annotated[int, "stage 2: number of images generated per evaluation", COUNT] = (
        10_000
    )
    lite_interval: Annotated[
        int,
        "stage 2: steps between small evaluations until the first full one; their metrics are"
        " named `eval/fid_lite` and so on; 0: none",
        COUNT_OR_ZERO,
    ] = 1000
    lite_samples: Annotated[
        int, "stage 2: number of images generated per small evaluation", COUNT
    ] = 512


@dataclass(frozen=True)
class DiscriminatorArch:
    """Projected discriminator on a frozen DINO ViT."""

    dino_ckpt_path: Annotated[str | None, "weights of the frozen backbone", LOCAL] = None
    ks: Annotated[
        int, "kernel size of the heads", Range(least=1, most=LARGEST_INTEGER, odd=True)
    ] = 9
    norm_type: Annotated[str, "`bn` (per-sample batch norm) or `gn`"] = "bn"
    using_spec_norm: Annotated[bool, "spectral normalisation of the heads"] = True
    norm_eps: Annotated[float, "epsilon of the normalisation", EPSILON] = 1e-6
    recipe: Annotated[
        str | dict[str, Any],
        "backbone: `S_8`, `S_16`, `B_16`, or a section of depth, embed_dim, num_heads, patch_size",
        FINITE,
    ] = "S_8"
    key_depths: Annotated[
        tuple[int, ...] | None,
        "blocks whose features the heads receive; default: those of the recipe",
        COUNT_OR_ZERO,
    ] = None


@dataclass(frozen=True)
class AugmentConfig:
    """DiffAug of the discriminator's input."""

    prob: Annotated[float, "probability of each augmentation", FRACTION] = 1.0
    cutout: Annotated[
        float, "side of the cutout as a fraction of the image's side", FRACTION_BELOW_ONE
    ] = 0.0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator and its training."""

    arch: DiscriminatorArch = field(default_factory=DiscriminatorArch)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class GanLossConfig:
    """Weights and starting epochs of the stage-1 losses in addition to L1."""

    disc_loss: Annotated[Literal["hinge", "vanilla"], "loss of the discriminator"] = "hinge"
    gen_loss: Annotated[Literal["vanilla"], "adversarial loss of the decoder"] = "vanilla"
    disc_weight: Annotated[float, "weight of the adversarial loss", LOSS_WEIGHT] = 0.0
    perceptual_weight: Annotated[float, "weight of LPIPS", LOSS_WEIGHT] = 0.0
    disc_start: Annotated[float, "epoch at which the adversarial loss starts", EPOCHS] = 0.0
    disc_upd_start: Annotated[
        float | None,
        "epoch at which training of the discriminator starts; default: disc_start",
        EPOCHS,
    ] = None
    lpips_start: Annotated[float, "epoch at which LPIPS starts", EPOCHS] = 0.0
    max_d_weight: Annotated[float, "upper bound of the adaptive weight", POSITIVE] = 1e4
    disc_updates: Annotated[int, "discriminator updates per step", COUNT] = 1


@dataclass(frozen=True)
class GanConfig:
    """Adversarial and perceptual losses of stage 1."""

    disc: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: GanLossConfig = field(default_factory=GanLossConfig)
