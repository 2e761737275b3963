"""Deprecated names: modules keep the names that moved for one release, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping


def moved_names(module: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a module whose names are in other modules now.

    Args:
        module: full name of the module.
        names: name in the module -> ``package.module.name`` of today.
    """

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        now = names[name]
        # A DeprecationWarning is hidden unless it is raised in __main__.
        warnings.warn(
            f"{module}.{name} is deprecated and will be removed after the next release: use {now}",
            FutureWarning,
            stacklevel=2,
        )
        home, _, current = now.rpartition(".")
        return getattr(importlib.import_module(home), current)

    return find
