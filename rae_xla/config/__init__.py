"""Configuration of a run: the schema, and loading and validation of YAML files."""

from __future__ import annotations

from rae_xla.config.batch import BatchSplit, split_batch
from rae_xla.config.load import load_config
from rae_xla.config.run import RunConfig
from rae_xla.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuidanceConfig,
    MeshConfig,
    MiscConfig,
    ModelSpec,
    RuntimeConfig,
    SamplerConfig,
    TrackingConfig,
    TransportConfig,
    WeightsConfig,
)
from rae_xla.config.training_schema import (
    EvalConfig,
    GanConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
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
