"""Deprecated: these names are in ``rae_xla.data.shards.sources``."""

from __future__ import annotations

from rae_xla.moved import moved_names

_SOURCES = "rae_xla.data.shards.sources"

__getattr__ = moved_names(
    __name__,
    {
        "array_source": f"{_SOURCES}.array_source",
        "folder_source": f"{_SOURCES}.folder_source",
        "hub_source": f"{_SOURCES}.hub_source",
        "open_source": f"{_SOURCES}.open_image_source",
        "webdataset_source": f"{_SOURCES}.webdataset_source",
    },
)
