"""Errors of the Hugging Face hub, as messages with a remedy."""

from __future__ import annotations

import errno

from rae_xla.errors import UserError


def hub_error(
    error: Exception, repository: str, revision: str | None = None, *, pushing: bool = False
) -> UserError:
    """Return a ``UserError`` for an exception that a transfer raised.

    Args:
        error: from huggingface_hub, its transports (HTTP, Xet) or the disk.
        repository: ``owner/name``.
        revision: the requested revision.
        pushing: whether the transfer was an upload.
    """
    causes = _causes(error)
    return (
        _repository_error(error, repository, revision)
        or _disk_error(causes, repository)
        or _network_error(causes, repository, pushing)
        or UserError(
            f"{repository} could not be {'uploaded to' if pushing else 'downloaded from'} the hub: "
            f"{_first_line(error)}"
        )
    )


def _repository_error(error: Exception, repository: str, revision: str | None) -> UserError | None:
    """Return an error if the repository or revision does not exist or is not accessible."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repository} is gated: request access at {constants.ENDPOINT}/{repository}, then log "
            "in with `hf auth login` (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"there is no repository {repository} at {constants.ENDPOINT}, or it is private: "
            "check the name, or log in with `hf auth login` (or set HF_TOKEN); if it is a folder "
            "on this machine, write its path with a leading ./"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{repository} has no revision {revision!r}: give a branch, tag or commit")
    if isinstance(error, errors.HFValidationError):
        return UserError(
            f"{repository!r} is not a hub id: expected owner/name ({_first_line(error)})"
        )
    return None


def _disk_error(causes: list[BaseException], repository: str) -> UserError | None:
    """Return an error if the disk is full."""
    from huggingface_hub import constants

    full = (errno.ENOSPC, errno.EDQUOT)
    if any(isinstance(cause, OSError) and cause.errno in full for cause in causes):
        return UserError(
            f"no space left for {repository}: free some space, or set HF_HOME to another disk "
            f"(now {constants.HF_HOME})"
        )
    return None


def _network_error(causes: list[BaseException], repository: str, pushing: bool) -> UserError | None:
    """Return an error if the hub refused, failed or could not be reached."""
    from huggingface_hub import constants, errors

    answers = [getattr(cause, "response", None) for cause in causes]
    status = next((a.status_code for a in answers if a is not None), None)
    kinds = " ".join(type(cause).__name__ for cause in causes)
    cache = "" if pushing else f", and the cache {constants.HF_HUB_CACHE} is incomplete"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        if pushing:
            return UserError(f"HF_HUB_OFFLINE forbids the upload of {repository}: unset it")
        return UserError(
            f"{repository} is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids a download: unset it, or run `rae-xla hub pull` on a machine "
            "with a network and copy the cache"
        )
    if status in (401, 403):
        return UserError(
            f"the hub refuses access to {repository} (HTTP {status}): log in with `hf auth login`, "
            "or check the permissions of the token in HF_TOKEN"
        )
    if status is not None and status >= 500:
        return UserError(
            f"the hub ({constants.ENDPOINT}) reports a server error (HTTP {status}) for "
            f"{repository}{cache}: try again later"
        )
    if "Consistency check failed" in str(causes[0]) or "RemoteProtocolError" in kinds:
        return UserError(
            f"the transfer of {repository} was interrupted ({_first_line(causes[0])}): run the "
            "command again; complete files are kept"
        )
    if "Connect" in kinds or "Timeout" in kinds or "LocalEntryNotFound" in kinds:
        return UserError(
            f"{repository}: there is no network, or {constants.ENDPOINT} cannot be "
            f"reached{cache}: check the network (and HTTPS_PROXY, HF_ENDPOINT)"
            + ("" if pushing else ", or copy a cache to this machine and set HF_HOME")
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """Return an exception and the chain of its causes."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
