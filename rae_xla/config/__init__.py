"""Configuration of a run: the schema, and loading and validation of YAML files."""

from __future__ import annotations

from rae_xla.config.batch import BatchSplit, split_batch
from rae_xla.config.load import load_config
from rae_xla.config.run import RunConfig
from rae_xla.config.schema import (
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
    "load_config",
    "split_batch",
]
