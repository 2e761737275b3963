"""Find files in a folder and its sub-folders, and account for everything that is not taken."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from rae_xla.data.image_decoding import IMAGE_EXTENSIONS, extension_of, unread_image_hint
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

HIDDEN = "hidden"
"""Reason for files and folders whose names begin with a dot."""

FOLDER = "folder"
"""Reason for folders, where only files are searched for."""

MAX_REASONS = 50
"""Reasons that are counted separately; those after them are counted together."""

_SHOWN = 8  # reasons in a message
_OTHERS = "of other kinds"


@dataclass
class LeftOut:
    """What a search did not take: how many by reason, and the first one.

    Attributes:
        counts: number by reason, such as ``hidden`` or ``.txt``.
        first: name of the first one, by reason.
        images: whether there are images among them, which cannot be read here.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    images: bool = False

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file, folder or member of a tar."""
        if reason not in self.counts and len(self.counts) >= MAX_REASONS:
            reason = _OTHERS
        self.counts[reason] = self.counts.get(reason, 0) + count
        printable = name.encode("utf-8", "surrogateescape").decode(errors="replace")
        self.first.setdefault(reason, printable)

    def add_file(self, name: str) -> None:
        """Count a file that has another extension than those that are searched for."""
        extension = extension_of(name.rpartition("/")[2])
        self.images |= unread_image_hint(extension) is not None
        self.add(f".{extension}" if extension else "without extension", name)

    def merge(self, other: LeftOut) -> None:
        """Add the counts of another search."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)
        self.images |= other.images

    def __str__(self) -> str:
        """Return ``3 .heic (a.heic, …: `pip install …` to read it), 1 hidden (.DS_Store)``."""
        ordered = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        texts = []
        for reason in ordered[:_SHOWN]:
            count, more = self.counts[reason], ", …" if self.counts[reason] > 1 else ""
            hint = unread_image_hint(reason.removeprefix("."))
            hint = f": {hint}" if hint else ""
            texts.append(f"{count:,} {reason} ({self.first[reason]}{more}{hint})")
        rest = sum(self.counts[reason] for reason in ordered[_SHOWN:])
        return ", ".join(texts) + (f", {rest:,} more" if rest else "")

    def log(self, where: str) -> None:
        """Log one line, as a warning if there are images among what was left out."""
        if self.counts:
            level = logging.WARNING if self.images else logging.INFO
            logger.log(level, "%s: left out %s", where, self)


class ImageNotes(LeftOut):
    """Images of which something is not read: ``ROTATED`` or ``MORE_FRAMES``, and the first ones.

    Every reader of images has one, and logs it at its end; ``open_image`` fills it.
    """

    def log(self, where: str) -> None:
        """Log one line, as a warning."""
        if self.counts:
            logger.warning("%s: images %s", where, self)


def no_images_message(left_out: LeftOut) -> str:
    """Return the part of an error message that says what there is instead of images."""
    taken = f"extensions that are read: {', '.join(IMAGE_EXTENSIONS)}"
    return f"it contains {left_out}; {taken}" if left_out.counts else taken


def is_image(name: str) -> bool:
    """Return whether a file is taken for an image, by its name."""
    return not name.startswith(".") and extension_of(name) in IMAGE_EXTENSIONS


def find_files(
    folder: str | os.PathLike[str],
    left_out: LeftOut,
    extensions: Collection[str] = IMAGE_EXTENSIONS,
) -> list[str]:
    """Return the paths of all files with one of the extensions, at any depth, sorted.

    Links are followed. Files and folders whose names begin with a dot are not taken.

    Args:
        folder: a local folder.
        left_out: gets everything that is not taken.
        extensions: lower case, without a dot.

    Raises:
        UserError: a folder cannot be listed, or a link leads to a folder that contains it.
    """
    root = os.fspath(folder)
    found: list[str] = []
    _search(root, (os.path.realpath(root),), frozenset(extensions), found, left_out)
    return sorted(found)


def _search(
    folder: str,
    chain: tuple[str, ...],
    extensions: frozenset[str],
    found: list[str],
    left_out: LeftOut,
) -> None:
    """Search one folder; ``chain`` has the real paths of the start and of the links to here."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None
    for entry in listed:
        kind = kind_of(entry)
        if kind == FOLDER:
            links = chain
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                here = (*chain, os.path.realpath(folder))
                if any((above + os.sep).startswith(os.path.join(real, "")) for above in here):
                    raise UserError(f"{entry.path}: a link to a parent folder; remove it")
                links = (*chain, real)
            _search(entry.path, links, extensions, found, left_out)
        elif kind is not None:
            left_out.add(kind, entry.path)
        elif extension_of(entry.name) in extensions:
            found.append(entry.path)
        else:
            left_out.add_file(entry.path)


def kind_of(entry: os.DirEntry[str]) -> str | None:
    """Return ``FOLDER``, or why an entry of a folder is not taken; None for a file."""
    if entry.name.startswith("."):
        return HIDDEN
    if _is(entry.is_dir):
        return FOLDER
    if _is(entry.is_file):
        return None
    return "link without a target" if entry.is_symlink() else "pipe, socket or device"


def _is(test: Callable[[], bool]) -> bool:
    """Return the result of a method of ``os.DirEntry``; False for a link that leads to itself."""
    try:
        return test()
    except OSError:
        return False
