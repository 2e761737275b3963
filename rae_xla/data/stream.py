"""Deprecated: these names are in ``rae_xla.data.loader``."""

from __future__ import annotations

from rae_xla.moved import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "SampleStream": "rae_xla.data.loader.TrainingLoader",
        "one_pass": "rae_xla.data.loader.one_pass",
    },
)
