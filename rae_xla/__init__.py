"""Representation autoencoders and their diffusion transformers, from a laptop to a TPU pod."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rae_xla.config import load_config
    from rae_xla.models.dit_dh import DiTDH
    from rae_xla.models.rae import RAE
    from rae_xla.registry import instantiate

__all__ = ["RAE", "DiTDH", "__version__", "instantiate", "load_config"]
__version__ = "0.1.0"


_HOMES = {
    "RAE": "rae_xla.models.rae",
    "DiTDH": "rae_xla.models.dit_dh",
    "instantiate": "rae_xla.registry",
    "load_config": "rae_xla.config",
}


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that ``import rae_xla`` stays instant."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
