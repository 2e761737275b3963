"""Conversion of plain YAML values to dataclasses, with type checks and user errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rae_xla.config.run import RunConfig
from rae_xla.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where the value of each key was given, for error messages.

    Attributes:
        file: path of the YAML file, if any.
        written: dotted keys that the file (or its base) sets.
        overridden: dotted keys that the command line sets.
    """

    file: str | None = None
    written: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()

    def describe(self, key: str) -> str:
        """Return ``on the command line`` or ``in FILE``."""
        in_override = any(_within(key, o) for o in self.overridden)
        contains_override = any(_within(o, key) for o in self.overridden)
        in_file = any(_within(k, key) for k in self.written)
        if not self.file or in_override or (contains_override and not in_file):
            return "on the command line"
        return f"in {self.file}"


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")


def build(schema: type[T], values: Any, origin: Origin, prefix: str = "") -> T:
    """Build the dataclass ``schema`` from a mapping.

    Args:
        schema: a dataclass with type hints.
        values: mapping of its fields; None is an empty section.
        origin: for error messages.
        prefix: dotted key of the section with a trailing dot, for error messages.

    Raises:
        UserError: if a key is unknown or missing, or a value has the wrong type.
    """
    if values is None:  # an empty section
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(
            _type_message(prefix.rstrip("."), "a section of `key: value`", values, origin)
        )
    fields = {f.name: f for f in dataclasses.fields(cast(Any, schema))}
    hints = get_type_hints(schema)
    for name in values:
        if name not in fields:
            raise UserError(_unknown_key_message(prefix, str(name), fields, origin))
    arguments = {n: _convert(v, hints[n], prefix + n, origin) for n, v in values.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UserError(f"{prefix}{name} is missing ({origin.describe(prefix.rstrip('.'))})")
    return schema(**arguments)


def _unknown_key_message(prefix: str, name: str, valid: Iterable[str], origin: Origin) -> str:
    """Return the message for an unknown key, with the closest valid one."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"Did you mean {prefix}{near[0]}?" if near else _hint_of_other_section(name)
    if not hint:
        hint = f"Valid here: {', '.join(valid)}."
    return f"unknown key {prefix}{name} ({origin.describe(prefix + name)}). {hint}"


def _hint_of_other_section(name: str) -> str:
    """Return a hint if the key exists in another section, else an empty string."""
    places = [k for k in key_types(RunConfig) if k.rsplit(".", 1)[-1] == name]
    return f"Did you mean {' or '.join(places)}?" if places else ""


def key_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of ``schema`` with its type, ``Annotated`` included."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        inner = section_of(hint)
        if inner is None:
            keys[prefix + name] = hint
        else:
            keys.update(key_types(inner, f"{prefix}{name}."))
    return keys


def section_of(hint: Any) -> type | None:
    """Return the dataclass in ``Section``, ``Section | None`` or ``Annotated[…]``, else None."""
    if dataclasses.is_dataclass(hint):
        return cast(type, hint)
    for inner in get_args(hint):
        if dataclasses.is_dataclass(inner) or get_origin(inner) in (Union, types.UnionType):
            return section_of(inner)
    return None


def _convert(value: Any, hint: Any, key: str, origin: Origin) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        section = section_of(hint)
        if section is not None:
            return build(section, value, origin, key + ".")
    elif dataclasses.is_dataclass(hint):
        return build(cast(type, hint), value, origin, key + ".")
    try:
        return _coerce(value, hint)
    except TypeError:
        raise UserError(_type_message(key, describe_type(hint), value, origin)) from None


def _coerce(value: Any, hint: Any) -> Any:
    """Convert ``value`` to ``hint`` (int to float, list to tuple), or raise ``TypeError``."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        for option in inner:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if kind is Literal:
        if value in inner and not isinstance(value, bool):
            return value
        raise TypeError
    if kind is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(value) != len(inner):
            raise TypeError
        return tuple(_coerce(v, h) for v, h in zip(value, inner, strict=True))
    if kind is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def describe_type(hint: Any) -> str:
    """Return a readable name of a type, such as ``an integer or null``."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        options = [describe_type(h) for h in inner if h is not type(None)]
        return " or ".join([*options, "null"] if type(None) in inner else options)
    if kind is Literal:
        return "one of " + ", ".join(str(v) for v in inner)
    if kind is tuple:
        names = _TYPE_NAMES[inner[0]].split(" ", 1)[-1] + "s"
        return f"a list of {names}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {names}"
    if kind is dict:
        return "a section of `key: value`"
    return _TYPE_NAMES[hint]


def _type_message(key: str, wanted: str, got: Any, origin: Origin) -> str:
    kind = "null" if got is None else f"{got!r} ({type(got).__name__})"
    quote = "; write it in quotes" if wanted.startswith("a string") and got is not None else ""
    return f"{key} ({origin.describe(key)}): expected {wanted}, got {kind}{quote}"
