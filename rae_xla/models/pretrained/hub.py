"""Downloads from the Hugging Face hub, with checksums verified before a file is used.

``huggingface_hub.snapshot_download`` downloads, resumes and caches, but compares only sizes. This
module also compares each file once with the hub's checksum. ``HfApi.verify_repo_checksums`` is not
used because it needs a network: the cache names each file by its checksum (SHA-256 of large files,
git's SHA-1 of small ones), so cached files are verified offline, too. ``HF_HUB_OFFLINE``,
``HF_HOME``, ``HF_TOKEN`` and ``HF_ENDPOINT`` have their usual meaning.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.hub_errors import hub_error

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_BLOCK = 16 << 20  # bytes
_SHOWN = 5


@dataclass(frozen=True)
class HubFile:
    """A downloaded file of a repository.

    Attributes:
        path: path in the repository.
        size: size in bytes.
        checksum: hexadecimal SHA-256 (64 digits) or SHA-1 of the git blob (40 digits); empty if it
            is unknown, which happens offline with a cache on a file system without symbolic links.
    """

    path: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Snapshot:
    """Verified files of a repository at one commit, in a local folder."""

    repository: str
    commit: str
    folder: Path
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Total size of the files in bytes."""
        return sum(file.size for file in self.files)


def local_folder(name: str | Path, patterns: list[str] | None = None) -> Path:
    """Return a local folder, after downloading it if ``name`` is a hub id.

    Args:
        name: a path, or a hub id ``owner/name``; an existing path takes precedence.
        patterns: glob patterns of the files to download (``*.json``); None: all files.

    Raises:
        UserError: there is no such path or repository, or the download fails.
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
    """Download files of a repository that are not cached, and verify all of them.

    Without a network, files come from the cache if it has all of them; ``to`` needs a network.

    Args:
        repository: ``owner/name``.
        patterns: glob patterns of the files; None: all files.
        to: destination folder, which keeps the repository's paths; None: the hub's cache.
        revision: branch, tag or commit; default: ``main``.

    Raises:
        UserError: no network, no such repository or file, no access, a full disk, or a wrong
            checksum (the file is removed, so that the next attempt downloads it again).
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
    except Exception as error:  # three transports and a cache raise their own exceptions
        raise hub_error(error, repository, revision) from error
    wanted = _matching(files, allow)
    if not wanted:
        what = "no files" if allow is None else f"no file that matches {', '.join(allow)}"
        raise UserError(f"{repository} on the hub (commit {commit[:8]}) has {what}")
    verified = tuple(_verify(repository, folder, path, checksum) for path, checksum in wanted)
    return Snapshot(repository, commit, folder, verified)


def pull_files(repository: str, paths: Sequence[str]) -> dict[str, Path]:
    """Download single files; see ``pull``.

    Returns:
        Path in the repository -> local path.

    Raises:
        UserError: as for ``pull``, or the repository has no such file.
    """
    snapshot = pull(repository, paths)
    available = {file.path for file in snapshot.files}
    if missing := [path for path in paths if path not in available]:
        raise UserError(
            f"{repository} (commit {snapshot.commit[:8]}) has no {', '.join(missing[:_SHOWN])}: "
            "the repository has changed; or the hub cannot be reached, and the cache has only some "
            "of its files"
        )
    return {path: snapshot.folder / path for path in paths}


def checksum(path: Path, expected: str) -> str:
    """Return the checksum of a file, by the method of the expected one (SHA-256 or git's SHA-1)."""
    if len(expected) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _cached(folder: Path, repository: str) -> dict[str, str]:
    """Return path -> checksum of the files in a cached snapshot, from the targets of its links.

    A cache on a file system without links does not contain them: then the hub is queried, and
    offline they stay empty.
    """
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        # Not resolved further: the cached file may itself be a link to a file with another name.
        name = path.readlink().name if path.is_symlink() else ""
        found[path.relative_to(folder).as_posix()] = name if _HASH.fullmatch(name) else ""
    if all(found.values()):
        return found
    try:
        listed = hub_checksums(repository, folder.name)
    except Exception:  # offline: the snapshot came from the cache without a network as well
        return found
    return {path: known or listed.get(path, "") for path, known in found.items()}


def hub_checksums(repository: str, commit: str) -> dict[str, str]:
    """Return path -> checksum of all files of a commit, from the hub."""
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


def _verify(repository: str, folder: Path, path: str, expected: str) -> HubFile:
    """Compare a file with its checksum, unless this version of it was verified before."""
    file = folder / path
    try:
        status = file.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
        if expected and _verified_stamp(repository, expected) != stamp:
            if checksum(file, expected) != expected:
                raise _remove_damaged(repository, file, path, status.st_size)
            _record_stamp(repository, expected, stamp)
    except OSError as error:
        raise UserError(f"{path} of {repository} cannot be read: {error}") from error
    return HubFile(path, status.st_size, expected)


def _verified_stamp(repository: str, expected: str) -> str | None:
    """Return size and modification time of the file when it was verified last."""
    with contextlib.suppress(OSError):
        return _stamp_file(repository, expected).read_text(encoding="utf-8")
    return None


def _record_stamp(repository: str, expected: str, stamp: str) -> None:
    with contextlib.suppress(OSError):  # a read-only cache: files are verified each time
        _stamp_file(repository, expected).write_text(stamp, encoding="utf-8")


def _stamp_file(repository: str, expected: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("rae_xla", repository.replace("/", "--"), "checked") / expected


def _remove_damaged(repository: str, file: Path, path: str, size: int) -> UserError:
    """Remove a file with a wrong checksum; return the error to raise."""
    stored = file.resolve()
    message = (
        f"{path} of {repository} is damaged ({size:,} bytes; the checksum differs from the hub's: "
        "a truncated or altered download)"
    )
    try:
        file.unlink()
        stored.unlink(missing_ok=True)
    except OSError as error:
        return UserError(f"{message}; remove {stored} and try again ({error.strerror})")
    return UserError(f"{message}; it was removed: run the command again to download it")
