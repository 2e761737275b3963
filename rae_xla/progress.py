"""How far long work is: a bar in a terminal, lines in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar, overload

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
"""In a log file."""

T = TypeVar("T")


@overload
def progress_bar(iterable: Iterable[T], **settings: Any) -> tqdm[T]: ...
@overload
def progress_bar(**settings: Any) -> tqdm[Any]: ...
def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """A ``tqdm`` on stderr, with its settings.

    Where that is no terminal, it does not draw over what it has drawn: it writes a line at the
    beginning, one every half minute, and one at the end.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES}
        settings |= {"ncols": 0, "leave": True}
    return tqdm(iterable, **settings)


class _Lines:
    """What tqdm writes, by lines."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False
