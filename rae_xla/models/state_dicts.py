"""State dicts of wrapped modules: by DistributedDataParallel, torch.compile and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError

_INNER = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Name components that torch.compile, FSDP and activation checkpointing add, at any depth."""

_OUTER = "module."  # of DistributedDataParallel and of AveragedModel, around the model
_COUNTER = "n_averaged"  # of AveragedModel


def strip_wrappers(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dict without what wrapper modules add to its names.

    Args:
        state: tensors by name.
        source: where they come from, for error messages.

    Raises:
        UserError: two names would become equal.
    """
    plain = {name: _without_inner(name) for name in state}
    while _is_wrapped(plain.values()):
        plain = {
            name: _without_inner(short.removeprefix(_OUTER))
            for name, short in plain.items()
            if short != _COUNTER
        }
    stripped = {short: state[name] for name, short in plain.items()}
    if len(stripped) < len(plain):
        raise UserError(
            f"{source}: it holds weights twice, with and without the prefixes of wrapper modules: "
            "keep one of the two"
        )
    return stripped


def _without_inner(name: str) -> str:
    return ".".join(component for component in name.split(".") if component not in _INNER)


def _is_wrapped(names: Any) -> bool:
    kept = [name for name in names if name != _COUNTER]
    return bool(kept) and all(name.startswith(_OUTER) for name in kept)
