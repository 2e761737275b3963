"""One YAML describes a run: the published schema, typed, checked and completed."""

from __future__ import annotations

from rae_xla.config.batch import BatchSplit, check_mesh
from rae_xla.config.load import load_config
from rae_xla.config.run import RunConfig
from rae_xla.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    GanConfig,
    GuidanceConfig,
    MeshConfig,
    MiscConfig,
    ModelSpec,
    OptimizerConfig,
    RuntimeConfig,
    SamplerConfig,
    SchedulerConfig,
    TrackingConfig,
    TrainingConfig,
    TransportConfig,
    WeightsConfig,
)

__all__ = [
    "BatchSplit",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "GanConfig",
    "GuidanceConfig",
    "MeshConfig",
    "MiscConfig",
    "ModelSpec",
    "OptimizerConfig",
    "RunConfig",
    "RuntimeConfig",
    "SamplerConfig",
    "SchedulerConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TransportConfig",
    "WeightsConfig",
    "check_mesh",
    "load_config",
]
