"""The one error a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: bad input, a missing file, an impossible setting.

    The message says what was wrong, where, and what to do. The command line prints it on one
    line and exits with status 2; from Python it is an ordinary ``ValueError``.
    """
