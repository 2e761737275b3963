"""UserError: the exception for errors that the user can correct, and for lost connections."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """Invalid input, a missing file or an impossible setting.

    The message states what is wrong, where (key, file, value) and what to do. The command line
    prints it as one line and exits with ``exit_status``; in Python it is a ``ValueError``.

    Attributes:
        exit_status: of the command; subclasses may change it.
    """

    exit_status = 2


EXIT_CONNECTION_LOST = 77
"""Exit status after a lost connection: the command was right, and can be started again."""

UNREACHABLE = frozenset(
    {
        errno.EIO,  # of a mounted bucket or a network file system
        errno.ENOTCONN,
        errno.ESTALE,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)
"""Numbers of system errors of a network or storage that does not respond, of those that Python has
no class for."""


class ConnectionLostError(UserError):
    """Another process or the storage stopped responding during a run.

    Unlike after other user errors, the same command can be started again without a correction.
    """

    exit_status = EXIT_CONNECTION_LOST


def is_unreachable(error: OSError) -> bool:
    """Return whether a network or storage does not respond, rather than refuse a request.

    huggingface_hub's error for HF_HUB_OFFLINE is a ConnectionError too, but of a setting.
    """
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    return isinstance(error, (ConnectionError, TimeoutError)) or error.errno in UNREACHABLE


def exit_status(error: UserError | OSError) -> int:
    """Return the exit status of a command that ends with an error.

    Returns:
        ``EXIT_CONNECTION_LOST`` if the error, or the one that it was raised from, is a lost
        connection, else the status of a user error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and is_unreachable(cause):
            return EXIT_CONNECTION_LOST
        cause = cause.__cause__
    return error.exit_status if isinstance(error, UserError) else UserError.exit_status


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known name that is most similar, or an empty string."""
    similar = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {similar[0]}?)" if similar else ""
