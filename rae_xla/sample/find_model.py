"""Deprecated: these names are in ``rae_xla.sample.model_lookup``."""

from __future__ import annotations

from rae_xla.moved import moved_names

_LOOKUP = "rae_xla.sample.model_lookup"

__getattr__ = moved_names(
    __name__,
    {
        "Found": f"{_LOOKUP}.ResolvedModel",
        "find_model": f"{_LOOKUP}.resolve_model",
        "with_files": f"{_LOOKUP}.download_files",
    },
)
