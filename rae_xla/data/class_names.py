"""Class names: read from a file, recorded in a results folder, and looked up."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from rae_xla import storage
from rae_xla.data.class_lines import parse_class_lines
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000
CLASSES_FILE = "classes.json"
"""Name of the file in a results folder."""

RUN_FILE = "config.yaml"
"""Name of the file that every results folder has."""

MAX_LISTED = 20
"""Up to this many classes, an error for an unknown class lists all of them."""

MAX_CLASSES = 1 << 20
"""A larger label is treated as a mistake."""


def read_class_names(file: str) -> tuple[str, ...]:
    """Read the class names, in the order of their labels, from a ``--classes`` file.

    The file is a JSON object ``{"name": label}``, a JSON array of names, or text with one class per
    line: ``name label``, ``label name``, or just the names in the order of their labels. A file
    that can be read in two ways is refused.

    Raises:
        UserError: the file does not exist or has another format, a name or label is repeated, or
            the labels are not 0, 1, 2 … without a gap.
    """
    text = _read_text(file).strip()
    if not text:
        raise UserError(f"{file}: the list of classes is empty")
    pairs = _json_pairs(file, text) if text[0] in "{[" else parse_class_lines(file, text)
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


def _read_text(file: str) -> str:
    try:
        return storage.read_bytes(file).decode("utf-8-sig")  # without the mark of some editors
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; a list of classes is needed") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8; save it as one") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def in_label_order(names: Iterable[str]) -> list[str]:
    """Return names of classes sorted: by number if all of them are numbers, or else by text."""
    listed = sorted(names)
    if all(map(_is_number, listed)):
        listed.sort(key=int)
    return listed


def warn_of_numbers(names: Sequence[str], where: str) -> None:
    """Log a warning if names are numbers, but not the labels that they have.

    Args:
        names: by label.
        where: what the names are of, such as ``photos: class folder``.
    """
    differ = [label for label, name in enumerate(names) if name != str(label)]
    if differ and all(map(_is_number, names)) and any(int(names[i]) != i for i in differ):
        label = next(i for i in differ if int(names[i]) != i)
        logger.warning(
            "%s %s has the label %d, so labels and names differ: --classes FILE gives other "
            "labels; with `generate`, --classes takes names and --class-ids takes labels",
            where,
            names[label],
            label,
        )


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]{1,18}", name) is not None


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
            f"{where}: a label is {largest}, but only {len(given)} classes have names "
            f"(0 to {len(given) - 1}): name the others with --classes, or correct the label"
        )
    return given


def record_class_names(folder: str | Path, names: Sequence[str]) -> None:
    """Write class names to a results folder, or to a folder of a model.

    The numbers of 1,000 classes are not written: they stand for ImageNet's labels, whose names are
    known. Those of any other number of classes are the names of folders, or all that there is.
    """
    if len(names) != IMAGENET_CLASSES or list(names) != list(map(str, range(IMAGENET_CLASSES))):
        content = json.dumps(list(names)) + "\n"
        storage.write_bytes(storage.join(str(folder), CLASSES_FILE), content.encode())


def recorded_class_names(folder: str | Path) -> tuple[str, ...] | None:
    """Return the names that ``record_class_names`` wrote; None if it wrote none.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    file = storage.join(str(folder), CLASSES_FILE)
    try:
        names = json.loads(storage.read_bytes(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a list of class names ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: not a JSON array of class names; restore the file or remove it")
    return tuple(names)


def class_names_of_run(path: str) -> tuple[str, ...] | None:
    """Return the recorded class names of the run that a checkpoint belongs to, if it is known.

    Args:
        path: a results folder, a folder of checkpoints or a checkpoint in it, or a file there.
    """
    folder = os.path.expanduser(path)
    for _ in range(3):
        with suppress(OSError):  # a bucket without access: the caller reads the weights next
            if storage.exists(storage.join(folder, RUN_FILE)):
                return recorded_class_names(folder)
        folder = storage.split(folder)[0]
    return None


def fill_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Return ``count`` names: the given ones, and numbers for the labels after them."""
    return (*names, *map(str, range(len(names), count)))[:count]


def imagenet_names() -> tuple[str, ...]:
    """Return short English names of the 1,000 classes of ImageNet (ILSVRC 2012) by label.

    Source: the metadata of torchvision's classifiers, in a file because importing torchvision takes
    seconds.
    """
    file = resources.files("rae_xla.data").joinpath("imagenet_classes.txt")
    return tuple(file.read_text(encoding="utf-8").splitlines())


def find_class(query: str, names: Sequence[str]) -> int:
    """Return the label of a class, given its name, a synonym, or words that only its name contains.

    Synonyms are the parts of a name between commas. Case and punctuation matter only between names
    that differ in nothing else.

    Raises:
        UserError: no class matches, or several do; the message lists similar ones.
    """
    wanted = query.strip()
    plain = _plain(wanted)
    words = set(plain.split())
    tests = (
        lambda name: name == wanted,
        lambda name: name.lower() == wanted.lower(),
        lambda name: bool(plain) and _plain(name) == plain,
        lambda name: bool(plain) and plain in map(_plain, name.split(",")),
        lambda name: bool(words) and words <= set(_plain(name).split()),
    )
    for fits in tests:
        found = [label for label, name in enumerate(names) if fits(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"several classes are called {wanted!r}: {_numbered(found, names)}; give the label"
            )
    lower = [name.lower() for name in names]
    near = difflib.get_close_matches(wanted.lower(), lower, n=3)
    near += [name for name in lower if wanted.lower() in name and len(wanted) > 2][:3]
    labels = list(dict.fromkeys(map(lower.index, near)))
    hint = (
        f"there are {len(names)} classes, from {names[0]!r} to {names[-1]!r}: give its number, or "
        "a name"
    )
    if labels:
        hint = f"similar: {_numbered(labels, names)}"
    elif len(names) <= MAX_LISTED:
        hint = f"there are {', '.join(names)}"
    raise UserError(f"there is no class {wanted!r}; {hint}")


def _plain(name: str) -> str:
    """Return a name in lower case, with single spaces in place of punctuation.

    Apostrophes join what they separate, and accents are kept.
    """
    joined = re.sub("['\u2019]", "", unicodedata.normalize("NFC", name).casefold())
    return " ".join(re.findall(r"[^\W_]+", joined))


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
        if _is_number(str(name)) and not isinstance(label, int):
            raise UserError(
                f'{file}: {name!r}: {label!r} has the label first; write {{"name": label}}, or '
                "an array of the names in the order of their labels"
            )
        if not isinstance(name, str) or type(label) is not int or not name.strip():
            raise UserError(f"{file}: {name!r}: {label!r} is not a class name with its label")
    return [(name, label) for name, label in content]


def _listed(labels: list[int]) -> str:
    more = ", …" if len(labels) > 5 else ""
    return ", ".join(map(str, labels[:5])) + more
