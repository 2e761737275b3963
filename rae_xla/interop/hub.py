"""Deprecated: these names are in ``rae_xla.models.pretrained.hub``."""

from __future__ import annotations

from rae_xla.moved import moved_names

_HUB = "rae_xla.models.pretrained.hub"

__getattr__ = moved_names(
    __name__, {"local_folder": f"{_HUB}.local_folder", "pull": f"{_HUB}.pull"}
)
