"""The whole configuration of a run, and what identifies the run it describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from rae_xla.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GanConfig,
    GuidanceConfig,
    MeshConfig,
    MiscConfig,
    ModelSpec,
    RuntimeConfig,
    SamplerConfig,
    TrackingConfig,
    TrainingConfig,
    TransportConfig,
    WeightsConfig,
)
from rae_xla.config.targets import full_name

# What may change from one start of a run to the next without making it another run: where it
# computes, what it reports and when it saves. Every other key is part of its mathematics.
# `epochs` and `steps` are here because going on for longer changes no step already taken;
# `data.train` because shards may move: what they hold has a fingerprint of its own.
_NOT_IDENTITY: tuple[str, ...] = (
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
    """One run: read with :func:`rae_xla.load_config`, saved with every result."""

    stage_1: Annotated[ModelSpec | None, "the autoencoder (RAE)"] = None
    stage_2: Annotated[ModelSpec | None, "the diffusion transformer"] = None
    transport: TransportConfig = field(default_factory=TransportConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    misc: MiscConfig = field(default_factory=MiscConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    eval: Annotated[EvalConfig | None, "evaluation while training; left out: none"] = None
    gan: Annotated[GanConfig | None, "LPIPS and GAN of stage 1; left out: L1 alone"] = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def time_dist_shift(self) -> float:
        """The time shift sqrt(dim / base) of training and sampling (1 where dim is unknown)."""
        dim = self.misc.time_dist_shift_dim
        return 1.0 if dim is None else float((dim / self.misc.time_dist_shift_base) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dicts, lists and scalars, every key present."""
        tree: dict[str, Any] = plain(asdict(self))
        return tree

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; ``load_config`` of it gives an equal one."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_yaml` to ``path``, making its folder if need be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yaml(), encoding="utf-8")

    def flat(self) -> dict[str, Any]:
        """Every key by its dotted name: ``{"training.epochs": 80, …}``."""
        return _flatten(self.to_dict())

    def identity(self) -> dict[str, Any]:
        """The keys of :meth:`flat` that define the run's mathematics.

        Models, data, transport, training and precision; not the devices, the results, or how
        often something is logged or saved.
        """
        left_out = _NOT_IDENTITY
        if self.training.global_batch_size is not None:
            # The optimizer sees the same batch however it is cut.
            left_out += ("training.batch_size", "training.grad_accum_steps")
        kept = {k: v for k, v in self.flat().items() if not _is_under(k, left_out)}
        targets = {k: full_name(v) for k, v in kept.items() if k.endswith(".target")}
        return kept | targets

    def fingerprint(self) -> str:
        """A hash (16 hex digits) of :meth:`identity`: equal for two starts of one run."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def diff(self, other: RunConfig) -> list[str]:
        """The keys of :meth:`identity` that differ, sorted: empty where it is the same run."""
        mine, theirs = self.identity(), other.identity()
        return sorted(
            k for k in mine.keys() | theirs.keys() if mine.get(k, ...) != theirs.get(k, ...)
        )


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def plain(value: Any) -> Any:
    """``value`` with its mappings as dicts and its sequences as lists, as YAML has them."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
