"""Representation autoencoders and their diffusion transformers, from a laptop to a TPU pod.

The public names are imported on first use, so that ``import rae_xla`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rae_xla.version import __version__

if TYPE_CHECKING:
    from rae_xla.config import load_config
    from rae_xla.interop.instantiate import instantiate
    from rae_xla.models.dit import LightningDiT
    from rae_xla.models.dit_dh import DiTDH
    from rae_xla.models.rae import RAE

__all__ = ["RAE", "DiTDH", "LightningDiT", "__version__", "instantiate", "load_config"]

_MODULES = {
    "RAE": "rae_xla.models.rae",
    "DiTDH": "rae_xla.models.dit_dh",
    "LightningDiT": "rae_xla.models.dit",
    "instantiate": "rae_xla.interop.instantiate",
    "load_config": "rae_xla.config",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _MODULES[name].startswith("rae_xla.models."):
        importlib.import_module("rae_xla.interop")  # from_pretrained then reads checkpoints, too
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
