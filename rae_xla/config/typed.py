"""Plain YAML values into dataclasses: every key known, every value of its type, or a UserError."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rae_xla.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where each key's value was written, for messages."""

    file: str | None = None
    written: frozenset[str] = frozenset()
    overridden: frozenset[str] = frozenset()

    def of(self, key: str) -> str:
        """``on the command line``, or ``in FILE``."""
        in_an_override = any(_within(key, o) for o in self.overridden)
        above_overrides = any(_within(o, key) for o in self.overridden)
        in_the_file = any(_within(k, key) for k in self.written)
        if not self.file or in_an_override or (above_overrides and not in_the_file):
            return "on the command line"
        return f"in {self.file}"


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")


def build(schema: type[T], values: Any, origin: Origin, prefix: str = "") -> T:
    """Build ``schema`` from a mapping.

    Raises:
        UserError: an unknown key, a missing one, or a value of another type; the message names
            the key, where it was written, and what was expected.
    """
    if values is None:  # a section that is named but left empty
        values = {}
    if not isinstance(values, Mapping):
        raise UserError(_wrong(prefix.rstrip("."), "a section of `key: value`", values, origin))
    fields = {f.name: f for f in dataclasses.fields(cast(Any, schema))}
    hints = get_type_hints(schema)
    for name in values:
        if name not in fields:
            raise UserError(unknown_key(prefix, str(name), fields, origin))
    arguments = {n: _convert(v, hints[n], prefix + n, origin) for n, v in values.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UserError(f"{prefix}{name} is missing ({origin.of(prefix.rstrip('.'))})")
    return schema(**arguments)


def unknown_key(prefix: str, name: str, valid: Iterable[str], origin: Origin) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"Did you mean {prefix}{near[0]}?" if near else _elsewhere(name)
    if not hint:
        hint = f"Valid here: {', '.join(valid)}."
    return f"unknown key {prefix}{name} ({origin.of(prefix + name)}). {hint}"


def _elsewhere(name: str) -> str:
    """A hint for a key that exists, but in another section."""
    from rae_xla.config.run import RunConfig

    places = [k for k in key_types(RunConfig) if k.rsplit(".", 1)[-1] == name]
    return f"There is {' and '.join(places)}." if places else ""


def key_types(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of ``schema`` with its type as annotated (``Annotated`` kept)."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        inner = section_of(hint)
        if inner is None:
            keys[prefix + name] = hint
        else:
            keys.update(key_types(inner, f"{prefix}{name}."))
    return keys


def section_of(hint: Any) -> type | None:
    """The dataclass in a type such as ``Section``, ``Section | None`` or ``Annotated[…]``."""
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
        raise UserError(_wrong(key, expected(hint), value, origin)) from None


def _coerce(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; an int is a number, a list is a tuple. TypeError otherwise."""
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


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def expected(hint: Any) -> str:
    """A type in a reader's words: ``an integer or null``."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        options = [expected(h) for h in inner if h is not type(None)]
        return " or ".join([*options, "null"] if type(None) in inner else options)
    if kind is Literal:
        return "one of " + ", ".join(str(v) for v in inner)
    if kind is tuple:
        what = _WORDS[inner[0]].split(" ", 1)[-1] + "s"
        return f"a list of {what}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {what}"
    if kind is dict:
        return "a section of `key: value`"
    return _WORDS[hint]


def _wrong(key: str, wanted: str, got: Any, origin: Origin) -> str:
    kind = "null" if got is None else f"{got!r} ({type(got).__name__})"
    quote = "; write it in quotes" if wanted.startswith("text") and got is not None else ""
    return f"{key} ({origin.of(key)}): expected {wanted}, got {kind}{quote}"
