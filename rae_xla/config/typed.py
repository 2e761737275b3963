"""Conversion of plain YAML values to dataclasses, with type checks and user errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from rae_xla.config.paths import PathRule, parse_path
from rae_xla.config.ranges import Range
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
        UserError: if a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    if values is None:  # an empty section
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(
            _type_message(prefix.rstrip("."), "a section of `key: value`", values, origin)
        )
    fields = {f.name: f for f in dataclasses.fields(cast(Any, schema))}
    hints = type_hints(cast(Any, schema))
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
    """Return the message for an unknown key, with the place where it exists, or a similar one."""
    valid = list(valid)
    elsewhere = [k for k in key_types(RunConfig) if k.rsplit(".", 1)[-1] == name]
    near = [f"{prefix}{n}" for n in difflib.get_close_matches(name, valid, n=1)]
    hint = f"Did you mean {' or '.join([*near, *elsewhere])}?"
    if not near and not elsewhere:
        hint = f"Valid here: {', '.join(valid)}."
    return f"unknown key {prefix}{name} ({origin.describe(prefix + name)}). {hint}"


@functools.cache
def type_hints(schema: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, ``Annotated`` included."""
    return get_type_hints(schema, include_extras=True)


def key_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of ``schema`` with its type, ``Annotated`` included."""
    keys: dict[str, Any] = {}
    for name, hint in type_hints(schema).items():
        inner = section_of(hint)
        if inner is None:
            keys[prefix + name] = hint
        else:
            keys.update(key_types(inner, f"{prefix}{name}."))
    return keys


def section_of(hint: Any) -> type | None:
    """Return the dataclass in ``Section``, ``Section | None`` or ``Annotated[…]``, else None."""
    if get_origin(hint) is Annotated:  # its other arguments may be instances of dataclasses
        hint = get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        return cast(type, hint)
    for inner in get_args(hint):
        if dataclasses.is_dataclass(inner) or get_origin(inner) in (Union, types.UnionType):
            return section_of(inner)
    return None


def check_value(value: Any, hint: Any, key: str, origin: Origin) -> None:
    """Raise ``UserError`` unless a value has a type, which may be annotated with a range."""
    _convert(value, hint, key, origin)


def _convert(value: Any, hint: Any, key: str, origin: Origin) -> Any:
    rules: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        section = section_of(hint)
        if section is not None:
            return build(section, value, origin, key + ".")
    elif dataclasses.is_dataclass(hint):
        return build(cast(type, hint), value, origin, key + ".")
    try:
        converted = _coerce(value, hint)
    except (TypeError, OverflowError):
        raise UserError(_type_message(key, describe_type(hint), value, origin)) from None
    is_path = any(isinstance(rule, PathRule) for rule in rules)  # parse_path has its own message
    if converted == "None" and not is_path and type(None) in get_args(hint):
        raise UserError(
            f"{key} ({origin.describe(key)}): 'None' is text here: for no value write null"
        )
    for rule in rules:
        if isinstance(rule, Range):
            _check_range(converted, rule, key, origin)
        elif isinstance(rule, PathRule):
            return _parse_paths(converted, rule, f"{key} ({origin.describe(key)})")
    return converted


def _check_range(value: Any, accepted: Range, key: str, origin: Origin) -> None:
    """Raise ``UserError`` unless a number, or each of a list or section, is in its range."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_range(inner, accepted, f"{key}.{name}", origin)
        return
    several = isinstance(value, (list, tuple))
    for number in value if several else (value,):
        if several and isinstance(number, (list, Mapping)):
            _check_range(number, accepted, key, origin)
        if isinstance(number, (int, float)) and not accepted.contains(number):
            shown = f"{number} in {list(value)}" if several else f"{number}"
            raise UserError(
                f"{key} ({origin.describe(key)}): expected {accepted.describe(number)}, got {shown}"
            )


def _parse_paths(value: Any, rule: PathRule, what: str) -> Any:
    """Return the normal form of a path, or of each of a list; other values as they are."""
    if isinstance(value, str):
        return parse_path(value, what, rule)
    if isinstance(value, tuple):
        return tuple(parse_path(path, what, rule) for path in value)
    return value


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
    if kind is tuple and get_origin(inner[0]) is Literal:
        return "a list of " + ", ".join(map(str, get_args(inner[0])))
    if kind is tuple:
        names = _TYPE_NAMES[inner[0]].split(" ", 1)[-1] + "s"
        return f"a list of {names}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {names}"
    if kind is dict:
        return "a section of `key: value`"
    return _TYPE_NAMES[hint]


def _type_message(key: str, wanted: str, got: Any, origin: Origin) -> str:
    kind = "null" if got is None else f"{got!r} ({type(got).__name__})"
    hint = "; write it in quotes" if wanted.startswith("a string") and got is not None else ""
    if got == "None" and wanted.endswith("null"):
        hint = ": write null"
    return f"{key} ({origin.describe(key)}): expected {wanted}, got {kind}{hint}"
