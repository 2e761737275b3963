"""Console output of a running command: log lines and progress bars, both on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar, overload

from tqdm import tqdm

LOGGER_NAME = "rae_xla"
"""The logger above every module's ``logging.getLogger(__name__)``."""

SECONDS_BETWEEN_LINES = 30.0
"""How often a progress bar writes a line to a log file."""

T = TypeVar("T")


def configure_logging(level: int = logging.INFO) -> None:
    """Write the package's log records to stderr; further calls change only the level.

    The command line calls this. A program that imports ``rae_xla`` configures ``logging`` itself.

    Args:
        level: records below this level are dropped.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level)
    if not _console_handlers(logger):
        logger.addHandler(_ConsoleHandler())
    logger.propagate = False  # libraries such as absl add a handler to the root logger


def reset_logging() -> None:
    """Undo ``configure_logging``."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in _console_handlers(logger):
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def log_only_on_first_process(process_index: int) -> None:
    """Drop records below WARNING on every process but the first of a distributed run.

    Args:
        process_index: rank of this process, ``Backend.process_index``.
    """
    if process_index != 0:
        logging.getLogger(LOGGER_NAME).setLevel(logging.WARNING)


def _console_handlers(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if isinstance(handler, _ConsoleHandler)]


class _ConsoleHandler(logging.Handler):
    """Writes records to the current ``sys.stderr``, above a progress bar that is shown there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_ConsoleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as every logging handler: a failed write must not end a run
            self.handleError(record)


class _ConsoleFormatter(logging.Formatter):
    """The bare message; from WARNING on with the level in front of it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return f"{record.levelname.lower()}: {text}"


@overload
def progress_bar(iterable: Iterable[T], **settings: Any) -> tqdm[T]: ...
@overload
def progress_bar(**settings: Any) -> tqdm[Any]: ...
def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm[Any]:
    """Return a ``tqdm`` progress bar on stderr.

    Where stderr is not a terminal, such as in the log file of a job, the bar is written as lines:
    the first at the start, one every ``SECONDS_BETWEEN_LINES``, and the last at the end.

    Args:
        iterable: wrapped by the bar; without one, call the bar's ``update``.
        settings: keyword arguments of ``tqdm``.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _LineWriter(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES}
        settings |= {"ncols": 0, "leave": True}
    return tqdm(iterable, **settings)


class _LineWriter:
    """A text stream for ``tqdm`` that writes each new state of the bar as a separate line."""

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
