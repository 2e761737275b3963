"""Every key of the configuration with its type, for tests of ranges and of paths."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin

from rae_xla.config import RunConfig
from rae_xla.config.model_params import DENOISERS, RAEParams
from rae_xla.config.typed import key_types

SCHEMAS: dict[str, type] = {"": RunConfig, "stage_1.params.": RAEParams} | {
    f"{name}.": schema for name, schema in DENOISERS.items()
}


def leaf_types(hint: Any) -> set[type]:
    """Return the types that a hint is made of."""
    if get_origin(hint) is Annotated:
        return leaf_types(get_args(hint)[0])
    arguments = [a for a in get_args(hint) if a is not ...]
    return set().union(*map(leaf_types, arguments)) if arguments else {hint}


def rules(hint: Any, kind: type) -> list[Any]:
    """Return the ranges or the path rules of a hint."""
    return [rule for rule in get_args(hint)[1:] if isinstance(rule, kind)]


ALL_KEYS = {
    prefix + key: hint
    for prefix, schema in SCHEMAS.items()
    for key, hint in key_types(schema).items()
}
