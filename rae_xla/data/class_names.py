"""Class names: read from a file, recorded in a results folder, and looked up."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_xla import storage
from rae_xla.errors import UserError

CLASSES_FILE = "classes.json"
"""Name of the file in a results folder."""

MAX_LISTED = 20
"""Up to this many classes, an error for an unknown class lists all of them."""

MAX_CLASSES = 1 << 20
"""A larger label is treated as a mistake."""


def read_class_names(file: str) -> tuple[str, ...]:
    """Read the class names, in the order of their labels, from a ``--classes`` file.

    The file is a JSON object ``{"name": label}``, a JSON array of names, or text with one class per
    line: ``name label``, or just the names in the order of their labels.

    Raises:
        UserError: the file does not exist or has another format, a name or label is repeated, or
            the labels are not 0, 1, 2 … without a gap.
    """
    try:
        text = storage.read_bytes(file).decode().strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{file}: no such text file; --classes needs a list of classes") from None
    if not text:
        raise UserError(f"{file}: the list of classes is empty")
    pairs = _json_pairs(file, text) if text[0] in "{[" else _text_pairs(file, text)
    for what, counts in (
        ("class", Counter(name for name, _ in pairs)),
        ("label", Counter(label for _, label in pairs)),
    ):
        twice = [str(value) for value, count in counts.items() if count > 1]
        if twice:
            raise UserError(f"{file}: {what} {twice[0]} appears twice")
    names = {label: name for name, label in pairs}
    missing = [label for label in range(len(names)) if label not in names]
    if missing:
        strays = sorted(label for label in names if not 0 <= label < len(names))
        raise UserError(
            f"{file}: {len(names)} classes must have the labels 0 to {len(names) - 1}; "
            f"missing: {_listed(missing)}; out of range: {_listed(strays)}"
        )
    return tuple(names[label] for label in range(len(names)))


def names_for(largest: int, given: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """Return names for labels up to ``largest``: those ``given``, or otherwise their numbers.

    Args:
        largest: the largest label.
        given: names by label, if known.
        where: the origin of the labels, for error messages.

    Raises:
        UserError: there are too few names, or the label is too large to be one.
    """
    if largest >= MAX_CLASSES:
        raise UserError(f"{where}: a label is {largest}; labels are class numbers from 0")
    if given is None:
        return tuple(str(label) for label in range(largest + 1))
    if largest >= len(given):
        raise UserError(
            f"{where}: a label is {largest}, but --classes names {len(given)} classes "
            f"(0 to {len(given) - 1})"
        )
    return given


def record_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write a run's class names to its results folder, unless they are just the numbers."""
    if list(names) != [str(label) for label in range(len(names))]:
        (folder / CLASSES_FILE).write_text(json.dumps(list(names)) + "\n", encoding="utf-8")


def recorded_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the names that ``record_class_names`` wrote; None if it wrote none."""
    file = folder / CLASSES_FILE
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def imagenet_names() -> tuple[str, ...]:
    """Return short English names of the 1,000 classes of ImageNet (ILSVRC 2012) by label.

    Source: the metadata of torchvision's classifiers.
    """
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(query: str, names: Sequence[str]) -> int:
    """Return the label of a class, given its name or words that only its name contains.

    Case matters only between names that differ in nothing else.

    Raises:
        UserError: no class matches, or several do; the message lists similar ones.
    """
    wanted = query.strip()
    by_words = set(wanted.lower().split())
    tests = (
        lambda name: name == wanted,
        lambda name: name.lower() == wanted.lower(),
        lambda name: bool(by_words) and by_words <= set(name.lower().split()),
    )
    for fits in tests:
        found = [label for label, name in enumerate(names) if fits(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"several classes are called {wanted!r}: {_numbered(found, names)}")
    lower = [name.lower() for name in names]
    near = difflib.get_close_matches(wanted.lower(), lower, n=3)
    near += [name for name in lower if wanted.lower() in name and len(wanted) > 2][:3]
    labels = list(dict.fromkeys(map(lower.index, near)))
    hint = "give its number, or names"
    if labels:
        hint = f"similar: {_numbered(labels, names)}"
    elif len(names) <= MAX_LISTED:
        hint = f"there are {', '.join(names)}"
    raise UserError(f"there is no class {wanted!r}; {hint}")


def _numbered(labels: Sequence[int], names: Sequence[str]) -> str:
    more = ", …" if len(labels) > 5 else ""
    return ", ".join(f"{names[label]} ({label})" for label in labels[:5]) + more


def _json_pairs(file: str, text: str) -> list[tuple[str, int]]:
    try:
        # Pairs, because a dictionary would drop a repeated name.
        content: Any = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if text[0] == "[":
        content = [(name, label) for label, name in enumerate(content)]
    for name, label in content:
        if not isinstance(name, str) or type(label) is not int:
            raise UserError(f"{file}: {name!r}: {label!r} is not a class name with its label")
    return [(name, label) for name, label in content]


def _text_pairs(file: str, text: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    split = [line.rsplit(None, 1) for line in lines]
    numbered = [len(parts) == 2 and parts[1].isdecimal() for parts in split]
    if all(numbered):
        return [(name, int(label)) for name, label in split]
    if any(numbered):
        odd = lines[numbered.index(not numbered[0])]
        raise UserError(
            f"{file}: some lines end with a label and some do not ({odd!r}): number every class, "
            "or write names that end with a number as a JSON array"
        )
    return [(name, label) for label, name in enumerate(lines)]


def _listed(labels: list[int]) -> str:
    more = ", …" if len(labels) > 5 else ""
    return ", ".join(map(str, labels[:5])) + more
