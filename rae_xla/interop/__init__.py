"""Interoperability: instantiation from configurations, published models, conversion, hub uploads.

Importing this package lets ``from_pretrained`` read training checkpoints and results folders, which
``rae_xla.models`` cannot read by itself because ``rae_xla.checkpoint`` is a layer above it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rae_xla.checkpoint.tensors import find_weights, open_weights
from rae_xla.models.pretrained.weight_files import WeightsReader, register_reader
from rae_xla.storage import is_remote


def _is_checkpoint_location(path: str) -> bool:
    return is_remote(path) or Path(path).expanduser().is_dir()


def _read_checkpoint(path: str) -> tuple[str, Mapping[str, Any]]:
    location = find_weights(path)
    return location, open_weights(location)


register_reader("checkpoint", WeightsReader(_is_checkpoint_location, _read_checkpoint))
