"""The schema of a run: one frozen dataclass per YAML section.

Each key is a field; the text in its ``Annotated`` type is its documentation, from which
``docs/configuration.md`` is made. Published sections keep their published names and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class ModelSpec:
    """A model by name: what to build, with which keywords, from which weights."""

    target: Annotated[str, "class to build; our names and the published ones (`stage1.RAE`, …)"]
    params: Annotated[dict[str, Any], "keywords of that class"] = field(default_factory=dict)
    ckpt: Annotated[str | None, "weights: `ema` of a training checkpoint, or a state dict"] = None


@dataclass(frozen=True)
class TransportParams:
    """Path, prediction and time distribution of the flow."""

    path_type: Annotated[Literal["Linear", "GVP", "VP"], "interpolation of data and noise"] = (
        "Linear"
    )
    prediction: Annotated[
        Literal["velocity", "noise", "score"], "what the network's output means"
    ] = "velocity"
    loss_weight: Annotated[
        Literal["velocity", "likelihood"] | None, "weight of noise and score losses"
    ] = None
    train_eps: Annotated[float | None, "margin at the ends of time in training"] = None
    sample_eps: Annotated[float | None, "margin at the ends of time in sampling"] = None
    time_dist_type: Annotated[
        str, "training times before the shift: `uniform` or `logit-normal_MU_SIGMA`"
    ] = "logit-normal_0_1"


@dataclass(frozen=True)
class TransportConfig:
    """Flow matching."""

    params: TransportParams = field(default_factory=TransportParams)


@dataclass(frozen=True)
class SamplerParams:
    """The solver. The last four keys are read in SDE mode only."""

    sampling_method: Annotated[str, "`euler`, `heun`, `midpoint`, `rk4`, `dopri5`, …"] = "euler"
    num_steps: Annotated[int, "points of the time grid (Euler: evaluations + 1)"] = 50
    atol: Annotated[float, "absolute tolerance of adaptive methods"] = 1e-6
    rtol: Annotated[float, "relative tolerance of adaptive methods"] = 1e-3
    reverse: Annotated[bool, "published key; only `false` is possible"] = False
    diffusion_form: Annotated[str, "diffusion coefficient over time"] = "sigma"
    diffusion_norm: Annotated[float, "its magnitude"] = 1.0
    last_step: Annotated[str | None, "`Mean`, `Tweedie`, `Euler` or null"] = "Mean"
    last_step_size: Annotated[float, "length of that step"] = 0.04


@dataclass(frozen=True)
class SamplerConfig:
    """How noise becomes a latent."""

    mode: Annotated[Literal["ODE", "SDE"], "deterministic or stochastic"] = "ODE"
    params: SamplerParams = field(default_factory=SamplerParams)


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance or autoguidance; active where scale > 1."""

    method: Annotated[Literal["cfg", "autoguidance"], "what guides: null label or weaker model"] = (
        "cfg"
    )
    scale: Annotated[float, "guidance scale; 1 is none"] = 1.0
    t_min: Annotated[float, "guide from this (shifted) time …"] = 0.0
    t_max: Annotated[float, "… to this one, both included"] = 1.0
    guidance_model: Annotated[ModelSpec | None, "the weaker model of autoguidance"] = None


@dataclass(frozen=True)
class MiscConfig:
    """Facts the sections share. What is left out is filled in from the models."""

    latent_size: Annotated[
        tuple[int, int, int] | None, "C, H, W of a latent; default: what the encoder gives"
    ] = None
    num_classes: Annotated[
        int, "labels that are sampled; default: `stage_2.params.num_classes`"
    ] = 1000
    null_label: Annotated[int, "label of no class; default: `stage_2.params.num_classes`"] = 1000
    time_dist_shift_dim: Annotated[
        int | None, "time shift = sqrt(dim / base); default: C·H·W of the latent"
    ] = None
    time_dist_shift_base: Annotated[float, "dimension at which the shift is 1"] = 4096.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: Annotated[float, "learning rate (`scheduler.base_lr` replaces it)"] = 2e-4
    betas: Annotated[tuple[float, float], "decay of the two moments"] = (0.9, 0.95)
    weight_decay: Annotated[float, "decoupled weight decay, on every parameter"] = 0.0
    eps: Annotated[float, "added to the root of the second moment"] = 1e-8


@dataclass(frozen=True)
class SchedulerConfig:
    """Warm-up, then decay from base_lr to final_lr, then constant.

    ``warmup_steps`` replaces ``warmup_epochs``, ``decay_end_steps`` replaces ``decay_end_epoch``.
    """

    type: Annotated[Literal["linear", "cosine"], "shape of the decay"] = "linear"
    warmup_epochs: Annotated[float, "length of the warm-up; the decay starts at its end"] = 0.0
    warmup_steps: Annotated[int | None, "the same in optimizer steps"] = None
    decay_end_epoch: Annotated[float | None, "where final_lr is reached; default: no decay"] = None
    decay_end_steps: Annotated[int | None, "the same in optimizer steps"] = None
    base_lr: Annotated[float | None, "rate after the warm-up; default: `optimizer.lr`"] = None
    final_lr: Annotated[float | None, "rate after the decay; default: base_lr"] = None
    warmup_from_zero: Annotated[bool, "warm up linearly; else hold base_lr until the decay"] = False


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop of either stage."""

    epochs: Annotated[int, "passes over the training data"] = 1400
    steps: Annotated[int | None, "optimizer steps; replaces epochs"] = None
    global_batch_size: Annotated[int | None, "images per optimizer step, over all devices"] = None
    batch_size: Annotated[
        int | None, "images per device and micro-batch, where global_batch_size is not given"
    ] = None
    grad_accum_steps: Annotated[int, "micro-batches per optimizer step"] = 1
    ema_decay: Annotated[float, "decay of the averaged weights, per step"] = 0.9995
    log_every: Annotated[int, "steps between log lines"] = 100
    checkpoint_interval: Annotated[int, "epochs between checkpoints"] = 4
    sample_every: Annotated[int, "steps between sample images; 0: none"] = 2500
    num_samples: Annotated[int, "images in each of them"] = 16
    clip_grad: Annotated[float | None, "largest gradient norm; null or 0: no clipping"] = 1.0
    skip_grad_norm: Annotated[
        float | None, "a step whose gradient norm (before clipping) is above this is skipped, too"
    ] = None
    max_skipped: Annotated[
        int,
        "skipped steps in a row (loss or gradient not finite) after which the run goes back to its"
        " last good checkpoint",
    ] = 10
    max_rollbacks: Annotated[
        int, "how often in a row it goes back, without a checkpoint in between, before it ends"
    ] = 2
    profile_steps: Annotated[
        tuple[int, int] | None, "first and last step of which a profile is recorded"
    ] = None
    hang_timeout: Annotated[
        float,
        "seconds without progress after which a run ends itself; 12 times as long where it"
        " compiles, evaluates or makes pictures; 0: never",
    ] = 300.0
    global_seed: Annotated[int, "seed of weights, order, noise and times"] = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training."""

    eval_interval: Annotated[int, "steps between evaluations"] = 5000
    eval_model: Annotated[bool, "also evaluate the weights that are not averaged"] = False
    data_path: Annotated[str | None, "validation shards; default: `data.val`"] = None
    num_images: Annotated[int | None, "how many of them, from the first; default: all"] = None
    batch_size: Annotated[int, "images at a time; no result depends on it"] = 64
    reference_npz_path: Annotated[
        str | None, "images or moments that FIDs compare with; default: the validation images"
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        "stage 1: `psnr`, `ssim`, `lpips`, `rfid` (default: all but `lpips`); stage 2: `fid`,"
        " `sfid`, `is`, `precision`, `recall`, `fd_dinov2` (default: `fid`, `is`)",
    ] = None
    num_samples: Annotated[int, "stage 2: images drawn for an evaluation"] = 10_000
    lite_interval: Annotated[
        int,
        "stage 2: steps between small evaluations until the first whole one, named"
        " `eval/fid_lite` and so on; 0: none",
    ] = 1000
    lite_samples: Annotated[int, "stage 2: images drawn for a small one"] = 512


@dataclass(frozen=True)
class DiscriminatorArch:
    """Projected discriminator on a frozen DINO ViT."""

    dino_ckpt_path: Annotated[str | None, "weights of the frozen backbone"] = None
    ks: Annotated[int, "kernel size of the heads"] = 9
    norm_type: Annotated[str, "`bn` (per-sample batch norm) or `gn`"] = "bn"
    using_spec_norm: Annotated[bool, "spectral normalisation of the heads"] = True
    norm_eps: Annotated[float, "epsilon of the norm"] = 1e-6
    recipe: Annotated[
        str | dict[str, Any],
        "backbone: `S_8`, `S_16`, `B_16`, or its depth, embed_dim, num_heads, patch_size",
    ] = "S_8"
    key_depths: Annotated[tuple[int, ...] | None, "blocks that are tapped; default: recipe's"] = (
        None
    )


@dataclass(frozen=True)
class AugmentConfig:
    """DiffAug of what the discriminator sees."""

    prob: Annotated[float, "probability of each augmentation"] = 1.0
    cutout: Annotated[float, "share of the side that is cut out"] = 0.0


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator and its training."""

    arch: DiscriminatorArch = field(default_factory=DiscriminatorArch)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class GanLossConfig:
    """Weights and starting epochs of the stage-1 losses beside L1."""

    disc_loss: Annotated[Literal["hinge", "vanilla"], "loss of the discriminator"] = "hinge"
    gen_loss: Annotated[Literal["vanilla"], "adversarial loss of the decoder"] = "vanilla"
    disc_weight: Annotated[float, "weight of that loss"] = 0.0
    perceptual_weight: Annotated[float, "weight of LPIPS"] = 0.0
    disc_start: Annotated[float, "epoch at which the adversarial loss starts"] = 0.0
    disc_upd_start: Annotated[
        float | None, "epoch at which the discriminator starts to learn; default: disc_start"
    ] = None
    lpips_start: Annotated[float, "epoch at which LPIPS starts"] = 0.0
    max_d_weight: Annotated[float, "largest adaptive weight"] = 1e4
    disc_updates: Annotated[int, "discriminator updates per step"] = 1


@dataclass(frozen=True)
class GanConfig:
    """Adversarial and perceptual part of stage 1."""

    disc: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: GanLossConfig = field(default_factory=GanLossConfig)


@dataclass(frozen=True)
class WeightsConfig:
    """Files of the fixed networks in losses and metrics; null: what their own library downloads."""

    vgg16: Annotated[str | None, "VGG16 of LPIPS, as torchvision has it"] = None
    lpips: Annotated[str | None, "linear layers of LPIPS, as the lpips package has them"] = None
    inception: Annotated[str | None, "Inception of FID, as torch-fidelity has it"] = None
    dinov2: Annotated[
        str | None,
        "DINOv2 of fd_dinov2: folder or hub id; null: facebook/dinov2-with-registers-large",
    ] = None


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are cut."""

    train: Annotated[
        str | tuple[str, ...] | None, "folder of training shards, local or gs://; or a list of them"
    ] = None
    weights: Annotated[
        tuple[float, ...] | None, "of a list: each one's share of a batch; default: equal shares"
    ] = None
    val: Annotated[str | None, "folder of validation shards"] = None
    image_size: Annotated[int, "side of an image in pixels; default: what the decoder returns"] = (
        256
    )
    crop: Annotated[
        Literal["auto", "center", "random"], "`auto`: random in stage 1, centre in stage 2"
    ] = "auto"
    flip: Annotated[bool | None, "random horizontal flip; default: in stage 2 only"] = None
    num_workers: Annotated[int, "processes that decode images; 0: none"] = 0
    prefetch: Annotated[int, "batches prepared ahead"] = 2
    max_bad_samples: Annotated[
        float, "share of the samples read that may be unusable before the run stops"
    ] = 0.001
    cache_dir: Annotated[
        str | None, "folder on a local disk or RAM disk that keeps what is read of the shards"
    ] = None
    cache_gb: Annotated[float, "size of that folder at most, 10^9 bytes"] = 100.0


@dataclass(frozen=True)
class IciMesh:
    """The devices of a slice (of a host with GPUs, of a laptop): their product is their number."""

    data: Annotated[int, "groups that each hold a copy of the state; -1: all that remain"] = 1
    fsdp: Annotated[int, "devices that share a copy of the state and split the batch"] = -1
    tensor: Annotated[int, "devices that split the layers themselves (tensor parallelism)"] = 1


@dataclass(frozen=True)
class DcnMesh:
    """What the data centre's network joins."""

    data: Annotated[int, "slices, each with a copy of the state"] = 1


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged. The batch is split over data and fsdp, the state over fsdp and
    tensor.
    """

    ici: IciMesh = field(default_factory=IciMesh)
    dcn: DcnMesh = field(default_factory=DcnMesh)
    sharding: Annotated[
        tuple[str, ...], "files of sharding rules or folders of them; a later one counts more"
    ] = ("configs/sharding",)


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and in which precision the run computes."""

    backend: Annotated[
        Literal["auto", "xla", "torch"], "`auto`: TPU, then CUDA, then XLA on the CPU"
    ] = "auto"
    precision: Annotated[Literal["fp32", "bf16"], "of activations; weights stay fp32"] = "fp32"
    remat: Annotated[
        float,
        "share of the trained blocks that compute their activations again in the backward pass"
        " instead of keeping them: 0 none, 1 all",
    ] = 0.0
    scan: Annotated[bool, "on XLA: compile blocks that are alike once, and run them in a loop"] = (
        False
    )
    attention: Annotated[
        Literal["auto", "plain", "flash"],
        "on TPU in bf16: `flash` takes Pallas kernels that keep attention weights on the chip (for"
        " a multiple of 128 tokens; needs jax 0.7.1); `auto` does so from 1,024 tokens on, where"
        " they can be had",
    ] = "auto"
    compile: Annotated[bool, "torch.compile on CUDA"] = False
    compile_cache: Annotated[str | None, "folder that keeps compiled XLA programs"] = None
    devices: Annotated[int | None, "virtual CPU devices of the xla backend"] = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When state is saved, and how much of it is kept."""

    dir: Annotated[
        str | None, "their folder, local or gs://; default: `checkpoints` in the results folder"
    ] = None
    every_steps: Annotated[int | None, "steps between checkpoints; replaces the epochs"] = None
    keep_last: Annotated[int, "the newest checkpoints, which are kept"] = 3
    keep_every: Annotated[int | None, "those of every so many steps are kept for ever, besides"] = (
        None
    )
    resume: Annotated[bool, "go on where the results folder stopped"] = True
    retry_seconds: Annotated[
        float, "how long the last checkpoint is tried again before the run ends with an error"
    ] = 600.0


@dataclass(frozen=True)
class TrackingConfig:
    """Metrics beyond metrics.jsonl and the console."""

    wandb: Annotated[bool, "log to Weights & Biases"] = False
    project: Annotated[str | None, "wandb project"] = None
    entity: Annotated[str | None, "wandb entity"] = None
    name: Annotated[str | None, "name of the run; default: the results folder's"] = None
