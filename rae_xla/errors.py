"""UserError: the exception for errors that the user can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input, a missing file or an impossible setting.

    The message states what is wrong, where (key, file, value) and what to do. The command line
    prints it as one line and exits with ``exit_status``; in Python it is a ``ValueError``.

    Attributes:
        exit_status: of the command; subclasses may change it.
    """

    exit_status = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name that is most similar, or an empty string."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""
