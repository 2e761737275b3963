"""Exit statuses: what a restart can fix, and what it cannot."""

import errno

import pytest

from rae_xla.errors import EXIT_CONNECTION_LOST, ConnectionLostError, UserError, exit_status


def raised_from(cause):
    try:
        raise UserError("a bucket: it cannot be written") from cause
    except UserError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionLostError("process 1 is gone"),
        ConnectionError("no answer (tried 3 times)"),
        TimeoutError(),
        OSError(errno.EHOSTUNREACH, "no route"),
        OSError(errno.EIO, "of a mounted bucket"),
        raised_from(ConnectionResetError()),
        raised_from(raised_from(TimeoutError())),
    ],
    ids=repr,
)
def test_a_lost_connection_can_be_restarted(error):
    assert exit_status(error) == EXIT_CONNECTION_LOST


@pytest.mark.parametrize(
    "error",
    [
        UserError("a wrong setting"),
        FileNotFoundError(errno.ENOENT, "no such object"),
        PermissionError("no access"),
        OSError(errno.ENOSPC, "no space left"),
        raised_from(OSError(errno.ENOSPC, "no space left")),
        raised_from(KeyError("mu")),
    ],
    ids=repr,
)
def test_other_errors_are_the_users_to_correct(error):
    assert exit_status(error) == 2
