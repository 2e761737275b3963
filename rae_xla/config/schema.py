"""Schema of the configuration: one frozen dataclass per YAML section.

Each key is a field, documented by the text in its ``Annotated`` type; ``docs/configuration.md`` is
generated from these texts. Sections of the published files keep their names and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class ModelSpec:
    """A model: the class to build, its keyword arguments and its weights."""

    target: Annotated[str, "class to build, by our name or the published one (`stage1.RAE`, …)"]
    params: Annotated[dict[str, Any], "keyword arguments of that class"] = field(
        default_factory=dict
    )
    ckpt: Annotated[
        str | None, "file of weights: a training checkpoint (its `ema`) or a state dict"
    ] = None


@dataclass(frozen=True)
class TransportParams:
    """Path, prediction and time distribution of the flow."""

    path_type: Annotated[Literal["Linear", "GVP", "VP"], "interpolation of data and noise"] = (
        "Linear"
    )
    prediction: Annotated[
        Literal["velocity", "noise", "score"], "quantity that the network predicts"
    ] = "velocity"
    loss_weight: Annotated[
        Literal["velocity", "likelihood"] | None, "weighting of the noise and score losses"
    ] = None
    train_eps: Annotated[float | None, "distance of training times from 0 and 1"] = None
    sample_eps: Annotated[float | None, "distance of sampling times from 0 and 1"] = None
    time_dist_type: Annotated[
        str, "distribution of training times before the shift: `uniform` or `logit-normal_MU_SIGMA`"
    ] = "logit-normal_0_1"


@dataclass(frozen=True)
class TransportConfig:
    """Flow matching."""

    params: TransportParams = field(default_factory=TransportParams)


@dataclass(frozen=True)
class SamplerParams:
    """Settings of the solver. The last four keys apply to SDE mode only."""

    sampling_method: Annotated[str, "`euler`, `heun`, `midpoint`, `rk4`, `dopri5`, …"] = "euler"
    num_steps: Annotated[int, "points of the time grid (Euler: evaluations + 1)"] = 50
    atol: Annotated[float, "absolute tolerance of adaptive methods"] = 1e-6
    rtol: Annotated[float, "relative tolerance of adaptive methods"] = 1e-3
    reverse: Annotated[bool, "published key; only `false` is possible"] = False
    diffusion_form: Annotated[str, "form of the diffusion coefficient over time"] = "sigma"
    diffusion_norm: Annotated[float, "magnitude of the diffusion coefficient"] = 1.0
    last_step: Annotated[
        str | None, "method of the last step: `Mean`, `Tweedie`, `Euler` or null (none)"
    ] = "Mean"
    last_step_size: Annotated[float, "size of the last step"] = 0.04


@dataclass(frozen=True)
class SamplerConfig:
    """Sampling of latents from noise."""

    mode: Annotated[Literal["ODE", "SDE"], "deterministic or stochastic"] = "ODE"
    params: SamplerParams = field(default_factory=SamplerParams)


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance or autoguidance; active if scale > 1."""

    method: Annotated[
        Literal["cfg", "autoguidance"], "guide with the null label or with a weaker model"
    ] = "cfg"
    scale: Annotated[float, "guidance scale; 1: no guidance"] = 1.0
    t_min: Annotated[float, "smallest (shifted) time with guidance"] = 0.0
    t_max: Annotated[float, "largest (shifted) time with guidance"] = 1.0
    guidance_model: Annotated[ModelSpec | None, "weaker model of autoguidance"] = None


@dataclass(frozen=True)
class MiscConfig:
    """Values that several sections share; omitted ones are derived from the models."""

    latent_size: Annotated[
        tuple[int, int, int] | None, "C, H, W of a latent; default: derived from the encoder"
    ] = None
    num_classes: Annotated[
        int, "number of classes to sample from; default: `stage_2.params.num_classes`"
    ] = 1000
    null_label: Annotated[int, "label that stands for no class; default: `misc.num_classes`"] = 1000
    time_dist_shift_dim: Annotated[
        int | None, "time shift = sqrt(dim / base); default: C·H·W of the latent"
    ] = None
    time_dist_shift_base: Annotated[float, "dimension for which the shift is 1"] = 4096.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: Annotated[float, "learning rate; `scheduler.base_lr` replaces it"] = 2e-4
    betas: Annotated[tuple[float, float], "decay rates of the two moments"] = (0.9, 0.95)
    weight_decay: Annotated[float, "decoupled weight decay, applied to every parameter"] = 0.0
    eps: Annotated[float, "added to the square root of the second moment"] = 1e-8


@dataclass(frozen=True)
class SchedulerConfig:
    """Warm-up, then decay from base_lr to final_lr, then constant.

    ``warmup_steps`` replaces ``warmup_epochs``, ``decay_end_steps`` replaces ``decay_end_epoch``.
    """

    type: Annotated[Literal["linear", "cosine"], "shape of the decay"] = "linear"
    warmup_epochs: Annotated[
        float, "length of the warm-up in epochs; the decay starts at its end"
    ] = 0.0
    warmup_steps: Annotated[int | None, "the same in optimizer steps"] = None
    decay_end_epoch: Annotated[
        float | None, "epoch at which final_lr is reached; default: no decay"
    ] = None
    decay_end_steps: Annotated[int | None, "the same in optimizer steps"] = None
    base_lr: Annotated[float | None, "learning rate after the warm-up; default: `optimizer.lr`"] = (
        None
    )
    final_lr: Annotated[float | None, "learning rate after the decay; default: base_lr"] = None
    warmup_from_zero: Annotated[
        bool, "increase the rate linearly from 0 during the warm-up; otherwise hold base_lr"
    ] = False


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop of both stages."""

    epochs: Annotated[int, "passes over the training data"] = 1400
    steps: Annotated[int | None, "optimizer steps; replaces epochs"] = None
    global_batch_size: Annotated[int | None, "images per optimizer step, over all devices"] = None
    batch_size: Annotated[
        int | None, "images per device and micro-batch, if global_batch_size is not given"
    ] = None
    grad_accum_steps: Annotated[int, "micro-batches per optimizer step"] = 1
    ema_decay: Annotated[
        float, "decay of the exponential moving average of the weights, per step"
    ] = 0.9995
    log_every: Annotated[int, "steps between log lines"] = 100
    checkpoint_interval: Annotated[int, "epochs between checkpoints"] = 4
    sample_every: Annotated[int, "steps between sample images; 0: none"] = 2500
    num_samples: Annotated[int, "number of sample images"] = 16
    clip_grad: Annotated[
        float | None, "gradient norm above which gradients are clipped; null or 0: no clipping"
    ] = 1.0
    skip_grad_norm: Annotated[
        float | None, "skip steps whose gradient norm before clipping exceeds this value"
    ] = None
    max_skipped: Annotated[
        int,
        "consecutive skipped steps (non-finite loss or gradient) after which the run rolls back to"
        " its last good checkpoint",
    ] = 10
    max_rollbacks: Annotated[
        int, "consecutive rollbacks, without a new checkpoint in between, after which the run fails"
    ] = 2
    profile_steps: Annotated[tuple[int, int] | None, "first and last step to profile"] = None
    hang_timeout: Annotated[
        float,
        "seconds without progress after which a run exits; 12 times as long during compilation,"
        " evaluation and sampling; 0: never",
    ] = 300.0
    global_seed: Annotated[int, "seed of initial weights, data order, noise and times"] = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_interval: Annotated[int, "steps between evaluations"] = 5000
    eval_model: Annotated[bool, "also evaluate the weights without EMA"] = False
    data_path: Annotated[str | None, "validation shards; default: `data.val`"] = None
    num_images: Annotated[
        int | None, "number of validation images, from the first; default: all"
    ] = None
    batch_size: Annotated[int, "images per batch; does not affect the metrics"] = 64
    reference_npz_path: Annotated[
        str | None, "reference images or moments of FID; default: the validation images"
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        "stage 1: `psnr`, `ssim`, `lpips`, `rfid` (default: all but `lpips`); stage 2: `fid`,"
        " `sfid`, `is`, `precision`, `recall`, `fd_dinov2` (default: `fid`, `is`)",
    ] = None
    num_samples: Annotated[int, "stage 2: number of images generated per evaluation"] = 10_000
    lite_interval: Annotated[
        int,
        "stage 2: steps between small evaluations until the first full one; their metrics are"
        " named `eval/fid_lite` and so on; 0: none",
    ] = 1000
    lite_samples: Annotated[int, "stage 2: number of images generated per small evaluation"] = 512


@dataclass(frozen=True)
class DiscriminatorArch:
    """Projected discriminator on a frozen DINO ViT."""

    dino_ckpt_path: Annotated[str | None, "weights of the frozen backbone"] = None
    ks: Annotated[int, "kernel size of the heads"] = 9
    norm_type: Annotated[str, "`bn` (per-sample batch norm) or `gn`"] = "bn"
    using_spec_norm: Annotated[bool, "spectral normalisation of the heads"] = True
    norm_eps: Annotated[float, "epsilon of the normalisation"] = 1e-6
    recipe: Annotated[
        str | dict[str, Any],
        "backbone: `S_8`, `S_16`, `B_16`, or a section of depth, embed_dim, num_heads, patch_size",
    ] = "S_8"
    key_depths: Annotated[
        tuple[int, ...] | None,
        "blocks whose features the heads receive; default: those of the recipe",
    ] = None


@dataclass(frozen=True)
class AugmentConfig:
    """DiffAug of the discriminator's input."""

    prob: Annotated[float, "probability of each augmentation"] = 1.0
    cutout: Annotated[float, "side of the cutout as a fraction of the image's side"] = 0.0


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
    disc_weight: Annotated[float, "weight of the adversarial loss"] = 0.0
    perceptual_weight: Annotated[float, "weight of LPIPS"] = 0.0
    disc_start: Annotated[float, "epoch at which the adversarial loss starts"] = 0.0
    disc_upd_start: Annotated[
        float | None, "epoch at which training of the discriminator starts; default: disc_start"
    ] = None
    lpips_start: Annotated[float, "epoch at which LPIPS starts"] = 0.0
    max_d_weight: Annotated[float, "upper bound of the adaptive weight"] = 1e4
    disc_updates: Annotated[int, "discriminator updates per step"] = 1


@dataclass(frozen=True)
class GanConfig:
    """Adversarial and perceptual losses of stage 1."""

    disc: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: GanLossConfig = field(default_factory=GanLossConfig)


@dataclass(frozen=True)
class WeightsConfig:
    """Weight files of frozen networks in losses and metrics; null: download by their library."""

    vgg16: Annotated[str | None, "VGG16 of LPIPS, in the format of torchvision"] = None
    lpips: Annotated[str | None, "linear layers of LPIPS, in the format of the lpips package"] = (
        None
    )
    inception: Annotated[str | None, "Inception of FID, in the format of torch-fidelity"] = None
    dinov2: Annotated[
        str | None,
        "DINOv2 of fd_dinov2: folder or hub id; null: facebook/dinov2-with-registers-large",
    ] = None


@dataclass(frozen=True)
class DataConfig:
    """Data sets, transforms and data loading."""

    train: Annotated[
        str | tuple[str, ...] | None, "folder of training shards, local or gs://; or a list of them"
    ] = None
    weights: Annotated[
        tuple[float, ...] | None,
        "for a list of folders: fraction of each batch from each; default: equal",
    ] = None
    val: Annotated[str | None, "folder of validation shards"] = None
    image_size: Annotated[
        int, "side of an image in pixels; default: the size of decoded images"
    ] = 256
    crop: Annotated[
        Literal["auto", "center", "random"], "`auto`: random in stage 1, center in stage 2"
    ] = "auto"
    flip: Annotated[bool | None, "random horizontal flips; default: only in stage 2"] = None
    num_workers: Annotated[int, "processes that decode images; 0: decode in the main process"] = 0
    prefetch: Annotated[int, "number of batches to prepare ahead"] = 2
    max_bad_samples: Annotated[
        float, "fraction of unreadable samples above which the run fails"
    ] = 0.001
    cache_dir: Annotated[
        str | None, "folder on a local disk or RAM disk that caches the shards"
    ] = None
    cache_gb: Annotated[float, "maximum size of the cache in 10^9 bytes"] = 100.0


@dataclass(frozen=True)
class IciMesh:
    """Axes over the devices of one slice or host; their product is the number of devices."""

    data: Annotated[
        int, "replicas of the training state (data parallelism); -1: all remaining devices"
    ] = 1
    fsdp: Annotated[
        int, "devices over which a replica is sharded, as is its batch; -1: all remaining"
    ] = -1
    tensor: Annotated[int, "devices over which each layer is split (tensor parallelism)"] = 1


@dataclass(frozen=True)
class DcnMesh:
    """Axes over the data-centre network."""

    data: Annotated[int, "number of slices, each with a replica of the training state"] = 1


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. The batch is split over data and fsdp, the state over fsdp and tensor."""

    ici: IciMesh = field(default_factory=IciMesh)
    dcn: DcnMesh = field(default_factory=DcnMesh)
    sharding: Annotated[
        tuple[str, ...], "files of sharding rules, or folders of them; later ones take precedence"
    ] = ("configs/sharding",)


@dataclass(frozen=True)
class RuntimeConfig:
    """Backend, precision and compilation."""

    backend: Annotated[
        Literal["auto", "xla", "torch"], "`auto`: TPU, then CUDA, then XLA on the CPU"
    ] = "auto"
    precision: Annotated[Literal["fp32", "bf16"], "precision of activations; weights are fp32"] = (
        "fp32"
    )
    remat: Annotated[
        float,
        "fraction of the trained blocks whose activations are rematerialised in the backward pass"
        " instead of stored: 0 none, 1 all",
    ] = 0.0
    scan: Annotated[bool, "on XLA: compile identical blocks once and run them in a loop"] = False
    attention: Annotated[
        Literal["auto", "plain", "flash"],
        "on TPU in bf16: `flash` selects Pallas kernels that keep the attention matrix on the chip"
        " (for multiples of 128 tokens; needs jax 0.7.1); `auto` selects them from 1,024 tokens on"
        " if they are available",
    ] = "auto"
    compile: Annotated[bool, "use torch.compile on CUDA"] = False
    compile_cache: Annotated[
        str | None, "folder for the persistent cache of compiled XLA programs"
    ] = None
    devices: Annotated[int | None, "number of virtual CPU devices of the xla backend"] = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, retention and resumption of checkpoints."""

    dir: Annotated[
        str | None,
        "folder of checkpoints, local or gs://; default: `checkpoints` in the results folder",
    ] = None
    every_steps: Annotated[
        int | None, "steps between checkpoints; replaces `training.checkpoint_interval`"
    ] = None
    keep_last: Annotated[int, "number of most recent checkpoints to keep"] = 3
    keep_every: Annotated[int | None, "also keep the checkpoints of every N-th step"] = None
    resume: Annotated[bool, "resume from the last checkpoint of the results folder"] = True
    retry_seconds: Annotated[
        float, "seconds for which writing the final checkpoint is retried before the run fails"
    ] = 600.0


@dataclass(frozen=True)
class TrackingConfig:
    """Tracking of metrics in addition to metrics.jsonl and the console."""

    wandb: Annotated[bool, "log to Weights & Biases"] = False
    project: Annotated[str | None, "wandb project"] = None
    entity: Annotated[str | None, "wandb entity"] = None
    name: Annotated[str | None, "name of the run; default: the name of the results folder"] = None
