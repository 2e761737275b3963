"""What can go wrong at the hub, in the user's terms: what happened and what to do."""

from __future__ import annotations

import errno

from rae_xla.errors import UserError


def explained(
    error: Exception, repository: str, revision: str | None = None, *, pushing: bool = False
) -> UserError:
    """One clear error for whatever huggingface_hub raised.

    Args:
        error: of the client, of its transports (HTTP, Xet) or of the disk.
        repository: ``owner/name``.
        revision: what was asked for.
        pushing: whether files were on their way to the hub.
    """
    causes = _causes(error)
    return (
        _of_the_repository(error, repository, revision)
        or _of_the_disk(causes, repository)
        or _of_the_network(causes, repository, pushing)
        or UserError(
            f"{repository} could not be {'sent to' if pushing else 'had from'} the hub: "
            f"{_first_line(error)}"
        )
    )


def _of_the_repository(error: Exception, repository: str, revision: str | None) -> UserError | None:
    """The hub answered: there is no such thing, or not for this user."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(
            f"{repository} is gated: ask for access at {constants.ENDPOINT}/{repository}, then log "
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
        return UserError(f"{repository!r} is no hub id: expected owner/name ({_first_line(error)})")
    return None


def _of_the_disk(causes: list[BaseException], repository: str) -> UserError | None:
    from huggingface_hub import constants

    full = (errno.ENOSPC, errno.EDQUOT)
    if any(isinstance(cause, OSError) and cause.errno in full for cause in causes):
        return UserError(
            f"no space left for {repository}: make room, or set HF_HOME to another disk (now "
            f"{constants.HF_HOME})"
        )
    return None


def _of_the_network(
    causes: list[BaseException], repository: str, pushing: bool
) -> UserError | None:
    from huggingface_hub import constants, errors

    answers = [getattr(cause, "response", None) for cause in causes]
    status = next((a.status_code for a in answers if a is not None), None)
    kinds = " ".join(type(cause).__name__ for cause in causes)
    cache = "" if pushing else f", and the cache {constants.HF_HUB_CACHE} has not all of it"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        if pushing:
            return UserError(f"HF_HUB_OFFLINE forbids to send {repository}: unset it")
        return UserError(
            f"{repository} is not (or not wholly) in the cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids a download: unset it, or run `rae-xla hub pull` where there is "
            "a network and copy the cache"
        )
    if status in (401, 403):
        return UserError(
            f"the hub refuses {repository} (HTTP {status}): log in with `hf auth login`, or check "
            "what the token in HF_TOKEN may do"
        )
    if status is not None and status >= 500:
        return UserError(
            f"the hub ({constants.ENDPOINT}) is out of order (HTTP {status}) for "
            f"{repository}{cache}: try again later"
        )
    if "Consistency check failed" in str(causes[0]) or "RemoteProtocolError" in kinds:
        return UserError(
            f"the transfer of {repository} was cut short ({_first_line(causes[0])}): run the "
            "command again; what is whole is kept"
        )
    if "Connect" in kinds or "Timeout" in kinds or "LocalEntryNotFound" in kinds:
        return UserError(
            f"{repository}: there is no network, or {constants.ENDPOINT} cannot be "
            f"reached{cache}: check the network (and HTTPS_PROXY, HF_ENDPOINT)"
            + ("" if pushing else ", or copy a cache here and set HF_HOME")
        )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
