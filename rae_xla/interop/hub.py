"""The Hugging Face hub: files of a repository on this machine, whole or not at all.

huggingface_hub downloads, resumes and caches; it checks sizes, and no more. Here every file is
also compared with the checksum the hub knows it by, once, before anything reads it. The cache names
a file by that checksum (SHA-256 of large files, git's SHA-1 of small ones), so that a cached file
can be checked without a network. ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT``
mean what they always do.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rae_xla.errors import UserError
from rae_xla.interop.hub_errors import explained
from rae_xla.models.hf_folder import is_hub_id

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BLOCK = 16 << 20
_SHOWN = 5


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its path there, its size in bytes and its checksum (hexadecimal).

    The checksum is SHA-256 (64 digits), the SHA-1 of a git blob (40 digits), or empty where it is
    known to nobody: without a network, of a cache on a disk without links.
    """

    path: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit, in a folder of this machine, found whole."""

    repository: str
    commit: str
    folder: Path
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


def local_folder(name: str | Path, patterns: list[str] | None = None) -> Path:
    """The folder a name stands for: a path on this machine as it is; else a repository's snapshot.

    Args:
        name: a path, or a hub id ``owner/name``; a folder that exists goes first.
        patterns: which files of the repository are wanted (``*.json``); None: all of them.

    Raises:
        UserError: there is no such path or repository, or its files could not be had whole.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(name, Path) or not is_hub_id(name):
        raise UserError(
            f"there is no folder {path} (the working directory is {Path.cwd()}); a model on the "
            "hub is named owner/name"
        )
    return pull(name, patterns).folder


def pull(
    repository: str,
    patterns: Sequence[str] | None = None,
    *,
    to: Path | None = None,
    revision: str | None = None,
) -> Snapshot:
    """Download files of a repository, unless they are here, and check them.

    Args:
        repository: ``owner/name``.
        patterns: which files; None: all.
        to: a folder that gets them, by their paths in the repository; None: the hub's cache.
        revision: branch, tag or commit; default: ``main``.

    Without a network the cache serves, if it has all of the files; a folder ``to`` needs the hub.

    Raises:
        UserError: no network, no such repository or file, no access to it, a full disk, or a file
            that is not what the hub says (which is removed, so that the next attempt fetches it).
    """
    from huggingface_hub import HfApi, snapshot_download

    allow = None if patterns is None else list(patterns)
    try:
        if to is not None:
            revision = HfApi().model_info(repository, revision=revision).sha
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=allow, local_dir=to)
        )
        if to is not None:
            commit = str(revision)
            files = hub_checksums(repository, commit)
        else:
            commit = folder.name
            files = _cached(folder, repository)
    except Exception as error:  # of three transports and a cache, each with its own kinds
        raise explained(error, repository, revision) from error
    wanted = _matching(files, allow)
    if not wanted:
        what = "no files" if allow is None else f"no file that matches {', '.join(allow)}"
        raise UserError(f"{repository} on the hub (commit {commit[:8]}) has {what}")
    checked = tuple(_check(repository, folder, file) for file in wanted)
    return Snapshot(repository, commit, folder, checked)


def pull_files(repository: str, paths: Sequence[str]) -> dict[str, Path]:
    """Download single files, see ``pull``; where each is on this machine, by its path there.

    Raises:
        UserError: as ``pull``, and when the repository has no such file.
    """
    snapshot = pull(repository, paths)
    there = {file.path for file in snapshot.files}
    if missing := [path for path in paths if path not in there]:
        raise UserError(
            f"{repository} (commit {snapshot.commit[:8]}) has no {', '.join(missing[:_SHOWN])}: "
            "if the hub cannot be reached just now, the cache may have only a part of what is "
            "there; else the repository has changed"
        )
    return {path: snapshot.folder / path for path in paths}


def checksum(path: Path, like: str) -> str:
    """The checksum of a file, by the method another one (``like``) was made with."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _cached(folder: Path, repository: str) -> dict[str, str]:
    """Path -> checksum of the files in a snapshot of the cache, from what its links lead to.

    A cache on a disk without links does not say them: then the hub does, or, without a network,
    nobody, and they are empty.
    """
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        # one step only: what the cache's own file may be a link to has another kind of name
        name = path.readlink().name if path.is_symlink() else ""
        found[path.relative_to(folder).as_posix()] = name if _HASH.fullmatch(name) else ""
    if all(found.values()):
        return found
    try:
        listed = hub_checksums(repository, folder.name)
    except Exception:  # the download did without a network, too
        return found
    return {path: known or listed.get(path, "") for path, known in found.items()}


def hub_checksums(repository: str, commit: str) -> dict[str, str]:
    """Path -> checksum, as the hub has them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(repository, recursive=True, revision=commit)
    return {
        entry.path: entry.blob_id if entry.lfs is None else entry.lfs.sha256
        for entry in tree
        if isinstance(entry, RepoFile)
    }


def _matching(files: dict[str, str], patterns: list[str] | None) -> list[tuple[str, str]]:
    from huggingface_hub.utils import filter_repo_objects

    return [(path, files[path]) for path in filter_repo_objects(files, allow_patterns=patterns)]


def _check(repository: str, folder: Path, file: tuple[str, str]) -> HubFile:
    """Compare a file with its checksum, unless this very file was compared before."""
    path, expected = file
    place = folder / path
    try:
        status = place.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        if expected and _noted(repository, expected) != stamp:
            if checksum(place, expected) != expected:
                raise _broken(repository, place, path, status.st_size)
            _note(repository, expected, stamp)
    except OSError as error:
        raise UserError(f"{path} of {repository} cannot be read: {error}") from error
    return HubFile(path, status.st_size, expected)


def _noted(repository: str, expected: str) -> str | None:
    """Size and time of the file that was found whole last."""
    with contextlib.suppress(OSError):
        return _place_of_notes(repository, expected).read_text(encoding="utf-8")
    return None


def _note(repository: str, expected: str, stamp: str) -> None:
    with contextlib.suppress(OSError):  # where nothing may be written, files are checked each time
        _place_of_notes(repository, expected).write_text(stamp, encoding="utf-8")


def _place_of_notes(repository: str, expected: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("rae_xla", repository.replace("/", "--"), "checked") / expected


def _broken(repository: str, place: Path, path: str, size: int) -> UserError:
    """Remove a file that is not what the hub says, and say so."""
    stored = place.resolve()
    said = (
        f"{path} of {repository} is damaged ({size:,} bytes with another checksum than the hub's: "
        "a truncated or altered download)"
    )
    try:
        place.unlink()
        stored.unlink(missing_ok=True)
    except OSError as error:
        return UserError(f"{said}; remove {stored} and try again ({error.strerror})")
    return UserError(f"{said}; it was removed: run the command again to download it")
