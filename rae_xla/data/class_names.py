"""The names of classes: read from a file that numbers them, or the numbers themselves."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_xla.data import storage
from rae_xla.errors import UserError

CLASSES_FILE = "classes.json"
"""In a results folder."""

SHOWN = 20
"""So many classes are named where none is like the one that is asked for."""

MOST_CLASSES = 1 << 20
"""A larger label is taken for a mistake rather than for so many classes."""


def read_class_names(file: str) -> tuple[str, ...]:
    """The names by label, from the file of ``--classes``.

    The file is a JSON object ``{"name": label}`` or array of names, or text of one class a line:
    ``name label``, or just names in the order of their labels.

    Raises:
        UserError: if there is no such file, it is something else, a name or a label stands there
            twice, or the labels are not 0, 1, 2 … without a gap.
    """
    try:
        text = storage.read_bytes(file).decode().strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{file}: no such text file; --classes takes a list of classes") from None
    if not text:
        raise UserError(f"{file}: the list of classes is empty")
    pairs = _json_pairs(file, text) if text[0] in "{[" else _text_pairs(file, text)
    for what, counts in (
        ("class", Counter(name for name, _ in pairs)),
        ("label", Counter(label for _, label in pairs)),
    ):
        twice = [str(value) for value, count in counts.items() if count > 1]
        if twice:
            raise UserError(f"{file}: {what} {twice[0]} stands there twice")
    names = {label: name for name, label in pairs}
    missing = [label for label in range(len(names)) if label not in names]
    if missing:
        strays = sorted(label for label in names if not 0 <= label < len(names))
        raise UserError(
            f"{file}: {len(names)} classes must have the labels 0 to {len(names) - 1}; "
            f"{_listed(missing)} missing, {_listed(strays)} too many"
        )
    return tuple(names[label] for label in range(len(names)))


def names_for(largest: int, given: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """The names for labels up to ``largest``: those ``given``, or else their numbers.

    Raises:
        UserError: naming ``where`` the labels come from, if there are too few names or the label
            can be none.
    """
    if largest >= MOST_CLASSES:
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
    """Keep the names of a run's classes in its results folder, where they are more than numbers."""
    if list(names) != [str(label) for label in range(len(names))]:
        (folder / CLASSES_FILE).write_text(json.dumps(list(names)) + "\n", encoding="utf-8")


def recorded_class_names(folder: Path) -> tuple[str, ...] | None:
    """What ``record_class_names`` kept there."""
    file = folder / CLASSES_FILE
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet (ILSVRC 2012) in the order of their labels, in short English
    words, as torchvision's classifiers have them.
    """
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(word: str, names: Sequence[str]) -> int:
    """The label of a class by its name, or by words of it that no other class has.

    Upper and lower case count only where two names differ in nothing else.

    Raises:
        UserError: no class or several of them fit; the message says which come near.
    """
    wanted = word.strip()
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
        hint = f"near it: {_numbered(labels, names)}"
    elif len(names) <= SHOWN:
        hint = f"there are {', '.join(names)}"
    raise UserError(f"there is no class {wanted!r}; {hint}")


def _numbered(labels: Sequence[int], names: Sequence[str]) -> str:
    more = ", …" if len(labels) > 5 else ""
    return ", ".join(f"{names[label]} ({label})" for label in labels[:5]) + more


def _json_pairs(file: str, text: str) -> list[tuple[str, int]]:
    try:
        # Pairs, since a dictionary would lose a name that stands there twice.
        content: Any = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from None
    if text[0] == "[":
        content = [(name, label) for label, name in enumerate(content)]
    for name, label in content:
        if not isinstance(name, str) or type(label) is not int:
            raise UserError(f"{file}: {name!r}: {label!r} is no class name with its number")
    return [(name, label) for name, label in content]


def _text_pairs(file: str, text: str) -> list[tuple[str, int]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    split = [line.rsplit(None, 1) for line in lines]
    numbered = [len(words) == 2 and words[1].isdecimal() for words in split]
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
