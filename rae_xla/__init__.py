"""Representation autoencoders and their diffusion transformers, from a laptop to a TPU pod."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rae_xla.config import load_config
    from rae_xla.registry import instantiate

__all__ = ["__version__", "instantiate", "load_config"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the two public functions on first use, so that ``import rae_xla`` stays instant."""
    if name == "load_config":
        from rae_xla.config import load_config

        return load_config
    if name == "instantiate":
        from rae_xla.registry import instantiate

        return instantiate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
