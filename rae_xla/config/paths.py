"""StoragePath: the one form that every path of the command line and of a configuration takes.

``parse_path`` is called once per path, right after parsing. Everything behind it gets either a
local path, in which ``~`` is expanded, or ``gs://bucket/name``; ``rae_xla.storage`` accepts both.
Relative paths stay relative to the working directory, which no command changes: written out in
full, they would make the identity of a run depend on the folder that it was started in.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from rae_xla.errors import UserError

SCHEME = "gs://"
"""The scheme of remote paths, that of Google Cloud Storage."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):/")
_BUCKET = re.compile(r"[A-Za-z0-9][\w.\-]*", re.ASCII)
_NULLS = ("None", "none", "NULL", "null", "Null", "nil")


class StoragePath(str):
    """A local path or ``gs://…`` in its normal form, from ``parse_path``.

    It is a string, so that whatever takes the text of a path takes it as well.
    """

    __slots__ = ()

    @property
    def is_remote(self) -> bool:
        """Whether it is in a bucket."""
        return self.startswith(SCHEME)

    @property
    def name(self) -> str:
        """The last part; empty for a bucket and for the root folder."""
        if self.is_remote:
            return self.removeprefix(SCHEME).partition("/")[2].rpartition("/")[2]
        return Path(self).name

    @property
    def suffix(self) -> str:
        """The ending of the name with its dot, such as ``.npz``; empty if it has none."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StoragePath:
        """The folder that contains it."""
        if self.is_remote:
            return StoragePath(self.removesuffix(self.name).rstrip("/")) if self.name else self
        return StoragePath(Path(self).parent)

    def __truediv__(self, name: str) -> StoragePath:
        """Return the path of a file or folder in this folder."""
        return StoragePath(f"{self}/{name}" if self.is_remote else os.path.join(self, name))


@dataclass(frozen=True)
class PathRule:
    """Which paths an option or a configuration key accepts.

    Attributes:
        remote: also ``gs://``.
        hub: also the id of a Hugging Face repository, ``owner/name``.
    """

    remote: bool = True
    hub: bool = False

    def describe(self) -> str:
        """Return for example ``local or gs://``."""
        kinds = ["local", *(["gs://"] if self.remote else []), *(["hub id"] if self.hub else [])]
        return ", ".join(kinds[:-1]) + " or " + kinds[-1] if len(kinds) > 1 else f"{kinds[0]} only"


ANYWHERE = PathRule()
LOCAL = PathRule(remote=False)
LOCAL_OR_HUB = PathRule(remote=False, hub=True)


def parse_path(text: str | os.PathLike[str], what: str, rule: PathRule = ANYWHERE) -> StoragePath:
    """Return the normal form of a path that a user gave.

    Args:
        text: the path. ``file://`` is another spelling of a local path.
        what: the option or the key that gave it, for error messages.
        rule: which paths are accepted.

    Raises:
        UserError: the path is empty or the text of a null value, has a scheme that is not
            supported, names no bucket, or refers to an unknown home folder.
    """
    given = os.fspath(text)
    if not given.strip():
        raise UserError(f"{what} is empty: give a path, or leave it out")
    if given in _NULLS:
        raise UserError(
            f"{what}: {given!r} is text here, and would be the name of a file: for no path write "
            f"null in a configuration, or leave the option out; for that name write ./{given}"
        )
    if any(ord(character) < 32 for character in given):
        raise UserError(f"{what}: {given!r} contains a control character: correct the path")
    if given.startswith("file:///"):
        given = given.removeprefix("file://")
    if match := _SCHEME.match(given):
        return _parse_remote(given, match[1], what, rule)
    return _parse_local(given, what)


def path_setting(key: str, path: str) -> str:
    """Return the override ``key=value`` that sets a key to a path.

    It is quoted: overrides are YAML, in which ``2024``, ``on`` and ``a #1`` are not texts.
    """
    return f"{key}={json.dumps(str(path), ensure_ascii=False)}"


def _parse_remote(given: str, scheme: str, what: str, rule: PathRule) -> StoragePath:
    """Return the normal form of a path with a scheme."""
    if not given.startswith(SCHEME):
        wrong = f"{scheme}://" if f"{scheme}://" in given else f"{scheme}:/"
        raise UserError(
            f"{what}: {given}: {wrong} is not supported: give a path that is {_or(rule)}"
        )
    if not rule.remote:
        raise UserError(
            f"{what}: {given}: gs:// is not supported here: give a path that is {_or(rule)} "
            "(`gcloud storage cp` copies from a bucket, gcsfuse mounts one)"
        )
    bucket, *names = given.removeprefix(SCHEME).rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{what}: {given} names no bucket: write gs://BUCKET/FOLDER")
    if "." in names or ".." in names:
        raise UserError(f"{what}: {given}: a bucket has no folders . and ..: write the full name")
    return StoragePath(SCHEME + "/".join([bucket, *filter(None, names)]))


def _parse_local(given: str, what: str) -> StoragePath:
    """Return the normal form of a local path."""
    if "://" in given:
        raise UserError(
            f"{what}: {given} has a scheme in its middle: give a local path or gs://BUCKET/FOLDER"
        )
    expanded = os.path.expanduser(given)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = given.split("/")[0]
        raise UserError(f"{what}: {given}: there is no home folder {user}: write the full path")
    return StoragePath(expanded.rstrip("/") or "/")


def _or(rule: PathRule) -> str:
    return rule.describe().removesuffix(" only")
