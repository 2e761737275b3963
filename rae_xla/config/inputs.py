"""The files and folders that a run reads, by its configuration."""

from __future__ import annotations

from typing import get_args

from rae_xla.config.model_params import RAEParams
from rae_xla.config.paths import PathRule
from rae_xla.config.run import RunConfig
from rae_xla.config.typed import key_types

_WRITTEN = ("checkpoint.dir", "data.cache_dir", "runtime.compile_cache")
_TYPES = key_types(RunConfig) | key_types(RAEParams, "stage_1.params.")
_KEYS = [
    key
    for key, hint in _TYPES.items()
    if any(isinstance(rule, PathRule) for rule in get_args(hint)[1:]) and key not in _WRITTEN
]


def input_paths(config: RunConfig) -> list[str]:
    """Return every path of a configuration that a run reads, hub ids included."""
    flat = config.flat()
    found: list[str] = []
    for key in _KEYS:
        value = flat.get(key)
        found += value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return found
