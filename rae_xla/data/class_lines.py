"""The lines of a text file of classes: ``name label``, ``label name``, or names alone."""

from __future__ import annotations

import re

from rae_xla.errors import UserError

_HEADERS = frozenset(
    (
        *("category", "categories", "class", "classes", "classname", "class_name"),
        *("class_id", "class_idx", "class_index", "id", "idx", "index", "label", "labels"),
        *("label_id", "name", "names", "number", "synset", "target", "wnid"),
    )
)
"""Titles of columns, in lower case; the names of real classes are hardly among them."""

_LABEL = "[0-9]{1,9}"
_AS_JSON = 'write a JSON array of the names, in the order of their labels, or {"name": label}'


def parse_class_lines(file: str, text: str) -> list[tuple[str, int]]:
    """Return names and labels from the lines of a file.

    Args:
        file: name of the file, for error messages.
        text: its content, not empty.

    Raises:
        UserError: it is a table (CSV), only some lines have a label, or the labels may be at the
            beginning or at the end of the lines.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    _refuse_tables(file, lines)
    last = [re.fullmatch(rf"(.*\S)\s+({_LABEL})", line) for line in lines]
    first = [re.fullmatch(rf"({_LABEL})\s+(\S.*)", line) for line in lines]
    at_end = [(match[1], int(match[2])) for match in last if match]
    at_start = [(match[2], int(match[1])) for match in first if match]
    complete = [pairs for pairs in (at_end, at_start) if _is_complete(pairs, len(lines))]
    if len(complete) == 2 and sorted(complete[0]) != sorted(complete[1]):
        raise UserError(
            f"{file}: every line begins and ends with a number ({lines[0]!r}), and either could be "
            f"the label: {_AS_JSON}"
        )
    if complete:
        return complete[0]
    for pairs, matches, where in ((at_end, last, "end"), (at_start, first, "begin")):
        if len(pairs) == len(lines):
            return pairs  # the caller reports which labels are missing or repeated
        if pairs:
            differ = [(match is None) != (matches[0] is None) for match in matches]
            odd = lines[differ.index(True)]
            raise UserError(
                f"{file}: some lines {where} with a label and some do not ({odd!r}): number every "
                f"class; or, if the numbers are part of the names, {_AS_JSON}"
            )
    return [(name, label) for label, name in enumerate(lines)]


def _is_complete(pairs: list[tuple[str, int]], count: int) -> bool:
    """Return whether there is a pair for each of ``count`` lines, with the labels 0, 1, 2 …"""
    return len(pairs) == count and sorted(label for _, label in pairs) == list(range(count))


def _refuse_tables(file: str, lines: list[str]) -> None:
    titles = [title.strip(" \"'").lower() for title in re.split(r"[,;\t]|\s+", lines[0])]
    if len(lines) > 1 and set(filter(None, titles)) <= _HEADERS:
        raise UserError(
            f"{file}: the first line, {lines[0]!r}, is the header of a table: remove it, and write "
            f"lines of `name label`; if it is a class, {_AS_JSON}"
        )
    patterns = (
        rf".*[,;]\s*\"?{_LABEL}\"?",  # cat,0
        rf"\"?{_LABEL}\"?\s*[,;].*",  # 0,cat
        rf"{_LABEL}\s*[:.)]\s*[^0-9].*",  # 0: cat
    )
    for pattern in patterns:
        if all(re.fullmatch(pattern, line) for line in lines):
            raise UserError(
                f"{file}: the lines ({lines[0]!r}) are those of a table (CSV) or a numbered list: "
                f"write lines of `name label`, or {_AS_JSON}"
            )
