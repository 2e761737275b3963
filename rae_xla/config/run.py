"""RunConfig: the configuration of a run, and the part of it that identifies the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from rae_xla.config.registry import full_name
from rae_xla.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuidanceConfig,
    InternalGuidanceConfig,
    MeshConfig,
    MiscConfig,
    ModelSpec,
    RepaConfig,
    RuntimeConfig,
    SamplerConfig,
    TrackingConfig,
    TransportConfig,
    WeightsConfig,
)
from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.config.training_schema import EvalConfig, GanConfig, TrainingConfig

# Keys that may change when a run is resumed: where it computes, what it reports and when it saves.
# Every other key affects the numerical result. `epochs` and `steps` are listed because a longer run
# changes no step already taken; `data.train` because shards may move: the trainer compares a
# fingerprint of their content instead.
_NOT_IN_IDENTITY: tuple[str, ...] = (
    "sampler",
    "guidance",
    "eval",
    "mesh",
    "checkpoint",
    "tracking",
    "weights.inception",
    "weights.dinov2",
    "data.train",
    "data.weights",
    "data.val",
    "data.num_workers",
    "data.prefetch",
    "data.max_bad_samples",
    "data.cache_dir",
    "data.cache_gb",
    "runtime.backend",
    "runtime.remat",
    "runtime.scan",
    "runtime.attention",
    "runtime.compile",
    "runtime.compile_cache",
    "runtime.devices",
    "training.epochs",
    "training.steps",
    "training.log_every",
    "training.max_skipped",
    "training.max_rollbacks",
    "training.checkpoint_interval",
    "training.sample_every",
    "training.profile_steps",
    "training.hang_timeout",
    "training.num_samples",
)


@dataclass(frozen=True)
class RunConfig:
    """Configuration of one run; read it with :func:`rae_xla.load_config`."""

    stage_1: Annotated[ModelSpec | None, "the autoencoder (RAE)"] = None
    stage_2: Annotated[ModelSpec | None, "the diffusion transformer"] = None
    text_to_image: Annotated[
        TextToImageConfig | None, "the text-to-image model, instead of stage_2"
    ] = None
    transport: TransportConfig = field(default_factory=TransportConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    internal_guidance: InternalGuidanceConfig = field(default_factory=InternalGuidanceConfig)
    repa: Annotated[RepaConfig | None, "alignment with a frozen encoder; omitted: none"] = None
    misc: MiscConfig = field(default_factory=MiscConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: Annotated[EvalConfig | None, "evaluation during training; omitted: none"] = None
    gan: Annotated[GanConfig | None, "LPIPS and GAN losses of stage 1; omitted: L1 only"] = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def time_dist_shift(self) -> float:
        """Time shift sqrt(dim / base) of training and sampling; 1 if dim is unknown."""
        dim = self.misc.time_dist_shift_dim
        return 1.0 if dim is None else float((dim / self.misc.time_dist_shift_base) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain dicts, lists and scalars, with every key."""
        tree: dict[str, Any] = to_plain(asdict(self))
        return tree

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML, which ``load_config`` reads back unchanged."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_yaml` to ``path``; create its folder if necessary."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")

    def flat(self) -> dict[str, Any]:
        """Return every key by its dotted name: ``{"training.epochs": 80, …}``."""
        return _flatten(self.to_dict())

    def identity(self) -> dict[str, Any]:
        """Return the keys of :meth:`flat` that affect the numerical result of the run.

        These are models, data, transport, training and precision; not devices, output folders, or
        how often something is logged or saved.
        """
        excluded = _NOT_IN_IDENTITY
        if self.training.global_batch_size is not None:
            # The gradient does not depend on how the batch is divided.
            excluded += ("training.batch_size", "training.grad_accum_steps")
        kept = {k: v for k, v in self.flat().items() if not _is_below(k, excluded)}
        targets = {k: full_name(v) for k, v in kept.items() if k.endswith(".target")}
        return kept | targets

    def fingerprint(self) -> str:
        """Return a hash (16 hex digits) of :meth:`identity`."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def diff(self, other: RunConfig) -> list[str]:
        """Return the sorted keys of :meth:`identity` that differ; none if the runs are the same."""
        mine, theirs = self.identity(), other.identity()
        return sorted(
            k for k in mine.keys() | theirs.keys() if mine.get(k, ...) != theirs.get(k, ...)
        )


def _is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def to_plain(value: Any) -> Any:
    """Return ``value`` with mappings as dicts and sequences as lists, as YAML represents them."""
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, str) else value  # a StoragePath is not plain


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
