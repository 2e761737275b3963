"""Schema of the configuration: one frozen dataclass per YAML section.

Each key is a field. Its ``Annotated`` type has the text that documents it, the range of its numbers
(``ranges.Range``) or the paths that it accepts (``paths.PathRule``); ``docs/configuration.md`` is
generated from these. Sections of the published files keep their names and defaults. The sections
of training are in ``training_schema``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rae_xla.config.paths import ANYWHERE, LOCAL, LOCAL_OR_HUB
from rae_xla.config.ranges import (
    COUNT,
    COUNT_OR_ZERO,
    EPSILON,
    FINITE,
    FRACTION,
    FRACTION_BELOW_ONE,
    LARGEST_INTEGER,
    LOSS_WEIGHT,
    MESH_AXIS,
    SECONDS,
    Range,
)


@dataclass(frozen=True)
class ModelSpec:
    """A model: the class to build, its keyword arguments and its weights."""

    target: Annotated[str, "class to build, by our name or the published one (`stage1.RAE`, …)"]
    params: Annotated[dict[str, Any], "keyword arguments of that class"] = field(
        default_factory=dict
    )
    ckpt: Annotated[
        str | None, "file of weights: a training checkpoint (its `ema`) or a state dict", ANYWHERE
    ] = None


@dataclass(frozen=True)
class TransportParams:
    """Path, prediction and time distribution of the flow."""

    path_type: Annotated[Literal["Linear", "GVP", "VP"], "interpolation of data and noise"] = (
        "Linear"
    )
    prediction: Annotated[
        Literal["velocity", "noise", "score", "x"],
        "quantity that the network predicts; `x`: the clean latent",
    ] = "velocity"
    loss_weight: Annotated[
        Literal["velocity", "likelihood"] | None, "weighting of the noise and score losses"
    ] = None
    train_eps: Annotated[
        float | None, "distance of training times from 0 and 1", Range(least=0, below=0.5)
    ] = None
    sample_eps: Annotated[
        float | None, "distance of sampling times from 0 and 1", Range(least=0, below=0.5)
    ] = None
    time_dist_type: Annotated[
        str, "distribution of training times before the shift: `uniform` or `logit-normal_MU_SIGMA`"
    ] = "logit-normal_0_1"
    truncate_times: Annotated[
        bool | None,
        "restrict training times to at most 0.999 before the shift; default: only if the"
        " prediction is not `x`",
    ] = None
    t_eps: Annotated[
        float | None,
        "least time by which a difference to the clean latent is divided to get a velocity;"
        " default: 0.05 if the prediction is `x`",
        Range(least=0, below=1),
    ] = None


@dataclass(frozen=True)
class TransportConfig:
    """Flow matching."""

    params: TransportParams = field(default_factory=TransportParams)


@dataclass(frozen=True)
class SamplerParams:
    """Settings of the solver. The last four keys apply to SDE mode only."""

    sampling_method: Annotated[str, "`euler`, `heun`, `midpoint`, `rk4`, `dopri5`, …"] = "euler"
    num_steps: Annotated[
        int,
        "points of the time grid (Euler: evaluations + 1); with `end` the number of steps",
        Range(least=2, most=LARGEST_INTEGER),
    ] = 50
    end: Annotated[
        float | None,
        "ODE mode: time before the shift at which sampling ends, such as 0; default: 0.001",
        FRACTION_BELOW_ONE,
    ] = None
    atol: Annotated[float, "absolute tolerance of adaptive methods", FRACTION] = 1e-6
    rtol: Annotated[float, "relative tolerance of adaptive methods", EPSILON] = 1e-3
    reverse: Annotated[bool, "published key; only `false` is possible"] = False
    diffusion_form: Annotated[str, "form of the diffusion coefficient over time"] = "sigma"
    diffusion_norm: Annotated[
        float, "magnitude of the diffusion coefficient", Range(least=0, most=1000)
    ] = 1.0
    last_step: Annotated[
        str | None, "method of the last step: `Mean`, `Tweedie`, `Euler` or null (none)"
    ] = "Mean"
    last_step_size: Annotated[float, "size of the last step", FRACTION_BELOW_ONE] = 0.04


@dataclass(frozen=True)
class SamplerConfig:
    """Sampling of latents from noise."""

    mode: Annotated[Literal["ODE", "SDE"], "deterministic or stochastic"] = "ODE"
    params: SamplerParams = field(default_factory=SamplerParams)


@dataclass(frozen=True)
class AdditionalGuidanceConfig:
    """Classifier-free guidance on top of internal guidance; active if scale > 1."""

    scale: Annotated[float, "guidance scale; 1: no guidance", Range(least=0, most=1000)] = 1.0
    t_min: Annotated[float, "smallest (shifted) time with guidance", FRACTION] = 0.0
    t_max: Annotated[float, "largest (shifted) time with guidance", FRACTION] = 1.0


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance, autoguidance or internal guidance; active if scale > 1."""

    method: Annotated[
        Literal["cfg", "autoguidance", "internal"],
        "guide with the null label, with a weaker model, or with the base head of the model",
    ] = "cfg"
    scale: Annotated[float, "guidance scale; 1: no guidance", Range(least=0, most=1000)] = 1.0
    t_min: Annotated[float, "smallest (shifted) time with guidance", FRACTION] = 0.0
    t_max: Annotated[float, "largest (shifted) time with guidance", FRACTION] = 1.0
    guidance_model: Annotated[ModelSpec | None, "weaker model of autoguidance"] = None
    unconditional_scale: Annotated[
        float | None,
        "internal guidance with `cfg`: scale for the null label; default: `scale`",
        Range(least=0, most=1000),
    ] = None
    cfg: AdditionalGuidanceConfig = field(default_factory=AdditionalGuidanceConfig)


@dataclass(frozen=True)
class InternalGuidanceConfig:
    """Training of the base head (`stage_2.params.base_model_depth`)."""

    base_model_coeff: Annotated[
        float, "weight of the base head's loss, relative to that of the model", LOSS_WEIGHT
    ] = 1.0


@dataclass(frozen=True)
class RepaConfig:
    """Alignment of tokens with a frozen encoder (`stage_2.params.repa_layer_depth`)."""

    coeff: Annotated[float, "weight of the alignment loss", LOSS_WEIGHT] = 0.5
    encoder_cls: Annotated[str, "class of the encoder, as in `stage_1.params`"] = "Dinov2withNorm"
    encoder_config_path: Annotated[
        str, "Hugging Face folder or hub id of the encoder", LOCAL_OR_HUB
    ] = "facebook/dinov2-with-registers-base"
    encoder_input_size: Annotated[
        int, "side in pixels of the images that the encoder receives", COUNT
    ] = 224
    encoder_params: Annotated[dict[str, Any], "further arguments of the encoder", FINITE] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class MiscConfig:
    """Values that several sections share; omitted ones are derived from the models."""

    latent_size: Annotated[
        tuple[int, int, int] | None, "C, H, W of a latent; default: derived from the encoder", COUNT
    ] = None
    num_classes: Annotated[
        int, "number of classes to sample from; default: `stage_2.params.num_classes`", COUNT
    ] = 1000
    null_label: Annotated[
        int, "label that stands for no class; default: `misc.num_classes`", COUNT_OR_ZERO
    ] = 1000
    time_dist_shift_dim: Annotated[
        int | None, "time shift = sqrt(dim / base); default: C·H·W of the latent", COUNT
    ] = None
    time_dist_shift_base: Annotated[
        float, "dimension for which the shift is 1", Range(above=0, most=1e9)
    ] = 4096.0


@dataclass(frozen=True)
class FDr6Weights:
    """Folders of the networks of `fdr6` except Inception; none is downloaded."""

    convnext: Annotated[str | None, "facebook/convnextv2-base-22k-224", LOCAL] = None
    dinov2: Annotated[str | None, "facebook/dinov2-large", LOCAL] = None
    mae: Annotated[str | None, "facebook/vit-mae-large", LOCAL] = None
    siglip2: Annotated[str | None, "google/siglip2-so400m-patch16-256", LOCAL] = None
    clip: Annotated[str | None, "openai/clip-vit-large-patch14", LOCAL] = None


@dataclass(frozen=True)
class WeightsConfig:
    """Weight files of frozen networks in losses and metrics; null: download by their library."""

    vgg16: Annotated[str | None, "VGG16 of LPIPS, in the format of torchvision", LOCAL] = None
    lpips: Annotated[
        str | None, "linear layers of LPIPS, in the format of the lpips package", LOCAL
    ] = None
    inception: Annotated[str | None, "Inception of FID, in the format of torch-fidelity", LOCAL] = (
        None
    )
    dinov2: Annotated[
        str | None,
        "DINOv2 of fd_dinov2: folder or hub id; null: facebook/dinov2-with-registers-large",
        LOCAL_OR_HUB,
    ] = None
    fdr6: FDr6Weights = field(default_factory=FDr6Weights)


@dataclass(frozen=True)
class DataConfig:
    """Data sets, transforms and data loading."""

    train: Annotated[
        str | tuple[str, ...] | None,
        "folder of training shards, local or gs://; or a list of them",
        ANYWHERE,
    ] = None
    weights: Annotated[
        tuple[float, ...] | None,
        "for a list of folders: fraction of each batch from each; default: equal",
        Range(above=0, most=1e6),
    ] = None
    val: Annotated[str | None, "folder of validation shards", ANYWHERE] = None
    image_size: Annotated[
        int, "side of an image in pixels; default: the size of decoded images", COUNT
    ] = 256
    crop: Annotated[
        Literal["auto", "center", "random"], "`auto`: random in stage 1, center in stage 2"
    ] = "auto"
    flip: Annotated[bool | None, "random horizontal flips; default: only in stage 2"] = None
    num_workers: Annotated[
        int | None,
        "processes that decode images; 0: a thread of the main process; default: on GPUs a core"
        " each, at most 8, otherwise 0",
        COUNT_OR_ZERO,
    ] = None
    prefetch: Annotated[int, "number of batches to prepare ahead", COUNT] = 2
    max_bad_samples: Annotated[
        float, "fraction of unreadable samples above which the run fails", FRACTION
    ] = 0.001
    cache_dir: Annotated[
        str | None, "folder on a local disk or RAM disk that caches the shards", LOCAL
    ] = None
    cache_gb: Annotated[
        float, "maximum size of the cache in 10^9 bytes", Range(above=0, most=1e6)
    ] = 100.0


@dataclass(frozen=True)
class IciMesh:
    """Axes over the devices of one slice or host; their product is the number of devices."""

    data: Annotated[
        int,
        "replicas of the training state (data parallelism); -1: all remaining devices",
        MESH_AXIS,
    ] = 1
    fsdp: Annotated[
        int,
        "devices over which a replica is sharded, as is its batch; -1: all remaining",
        MESH_AXIS,
    ] = -1
    tensor: Annotated[
        int, "devices over which each layer is split (tensor parallelism)", MESH_AXIS
    ] = 1


@dataclass(frozen=True)
class DcnMesh:
    """Axes over the data-centre network."""

    data: Annotated[int, "number of slices, each with a replica of the training state", COUNT] = 1
    fsdp: Annotated[
        int,
        "slices over which a replica is sharded, for states that no slice can hold: weights are"
        " gathered over the network between slices",
        COUNT,
    ] = 1


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. The batch is split over data and fsdp, the state over fsdp and tensor."""

    ici: IciMesh = field(default_factory=IciMesh)
    dcn: DcnMesh = field(default_factory=DcnMesh)
    sharding: Annotated[
        tuple[str, ...],
        "files of sharding rules, or folders of them; later ones take precedence",
        LOCAL,
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
        FRACTION,
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
        str | None, "folder for the persistent cache of compiled XLA programs", LOCAL
    ] = None
    replay: Annotated[
        bool,
        "on XLA: run the compiled program of a step again without tracing the step again; `false`"
        " traces every step, for debugging",
    ] = True
    devices: Annotated[int | None, "number of virtual CPU devices of the xla backend", COUNT] = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving, retention and resumption of checkpoints."""

    dir: Annotated[
        str | None,
        "folder of checkpoints, local or gs://; default: `checkpoints` in the results folder",
        ANYWHERE,
    ] = None
    every_steps: Annotated[
        int | None, "steps between checkpoints; replaces `training.checkpoint_interval`", COUNT
    ] = None
    keep_last: Annotated[int, "number of most recent checkpoints to keep", COUNT] = 3
    keep_every: Annotated[int | None, "also keep the checkpoints of every N-th step", COUNT] = None
    resume: Annotated[bool, "resume from the last checkpoint of the results folder"] = True
    retry_seconds: Annotated[
        float,
        "seconds for which writing the final checkpoint is retried before the run fails",
        SECONDS,
    ] = 600.0


@dataclass(frozen=True)
class TrackingConfig:
    """Tracking of metrics in addition to metrics.jsonl and the console."""

    wandb: Annotated[bool, "log to Weights & Biases"] = False
    project: Annotated[str | None, "wandb project"] = None
    entity: Annotated[str | None, "wandb entity"] = None
    name: Annotated[str | None, "name of the run; default: the name of the results folder"] = None
