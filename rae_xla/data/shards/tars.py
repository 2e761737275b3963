"""Find the tar files that a path names: a folder of them, one file, or a brace pattern."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from rae_xla import storage
from rae_xla.data.image_finder import FOLDER, HIDDEN, LeftOut
from rae_xla.data.shards.index import INDEX_FILE, TABLE_FILE, WRITING_FILE
from rae_xla.data.shards.texts import TEXT_FILES
from rae_xla.errors import UserError

_COMPRESSED = {
    ("tar.gz", "tgz"): "gunzip",
    ("tar.bz2", "tbz2", "tbz"): "bunzip2",
    ("tar.xz", "txz"): "unxz",
    ("tar.zst", "tzst"): "unzstd",
    ("tar.lz4",): "unlz4",
}
"""Extensions of compressed tars, and the command that decompresses them."""

_BRACES = re.compile(r"\{([^{}]*)\}")


def tar_files(source: str) -> list[str]:
    """Return the paths of the tar files that ``source`` names.

    What else is in a folder is logged.

    Args:
        source: a folder (its files are sorted by name), one file, or a brace pattern such as
            ``x-{0000..1023}.tar``; local or ``gs://``.

    Raises:
        UserError: there are none, some do not exist or are compressed, or the folder is being
            written.
    """
    refuse_compressed([source])
    if not is_tar_pattern(source):
        return _tars_of_folder(source)
    paths = expand_braces(source)
    folders = sorted({storage.split(path)[0] for path in paths})
    listed = {
        folder: storage.list_files(folder) if storage.is_folder(folder) else {}
        for folder in folders
    }
    split = [(path, *storage.split(path)) for path in paths]
    missing = [path for path, folder, name in split if name not in listed[folder]]
    if missing:
        more = f" and {len(missing) - 3} more of {len(paths)}" if len(missing) > 3 else ""
        raise UserError(
            f"{', '.join(missing[:3])}{more}: no such file; correct the name, or copy the missing "
            "files"
        )
    return paths


def _tars_of_folder(folder: str) -> list[str]:
    if not storage.is_folder(folder):
        raise UserError(f"{folder}: no such folder or tar file")
    present = storage.list_files(folder)
    if WRITING_FILE in present:
        raise UserError(
            f"{folder}: shards are being written here, or writing them was interrupted: let "
            "`rae-xla shards make` finish first"
        )
    names = sorted(name for name in present if is_tar(name))
    left_out = other_files(folder, present)
    if not names:
        refuse_compressed([storage.join(folder, name) for name in sorted(present)])
        found = f" (it contains {left_out})" if left_out.counts else ""
        raise UserError(f"{folder}: there is no .tar file in this folder{found}")
    left_out.log(folder)
    return [storage.join(folder, name) for name in names]


def is_tar(name: str) -> bool:
    """Return whether a file is taken for a tar, by its name."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def other_files(folder: str, present: Collection[str], known: Collection[str] = ()) -> LeftOut:
    """Return what a folder contains besides its tars and their index.

    Args:
        folder: local or ``gs://``.
        present: the names of its files.
        known: further files that an index lists, relative to the folder.

    Raises:
        UserError: something is named like a tar, but is not a file.
    """
    left_out = LeftOut()
    ours = {INDEX_FILE, TABLE_FILE, *TEXT_FILES, *known}
    for name in sorted(set(present) - ours):
        if name.startswith("."):
            left_out.add(HIDDEN, name)
        elif not is_tar(name):
            left_out.add_file(name)
    folders = storage.list_folders(folder)
    for name in sorted(set(folders) - {file.partition("/")[0] for file in known}):
        left_out.add(HIDDEN if name.startswith(".") else FOLDER, name)
    if not storage.is_remote(folder):
        for name in sorted(set(os.listdir(folder)).difference(present, folders)):
            if is_tar(name):
                raise UserError(
                    f"{storage.join(folder, name)}: a link without a target, or not a file: "
                    "remove it, or restore the file"
                )
            left_out.add("link without a target, pipe or socket", name)
    return left_out


def refuse_compressed(paths: Collection[str]) -> None:
    """Raise if there are compressed tars among ``paths``.

    Raises:
        UserError: the message has the command that decompresses them.
    """
    for extensions, command in _COMPRESSED.items():
        endings = tuple(f".{extension}" for extension in extensions)
        if found := [path for path in paths if path.lower().endswith(endings)]:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UserError(
                f"{found[0]}{more}: the tar is compressed, and samples are read by their byte "
                f"range, which needs plain tars: decompress it first (`{command} FILE`)"
            )


def is_tar_pattern(source: str) -> bool:
    """Return whether ``source`` names tar files rather than a folder of them."""
    return source.lower().endswith(".tar") and (
        bool(_BRACES.search(source)) or not storage.is_folder(source)
    )


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``a-{08..10}-{x,y}`` -> ``a-08-x``, ``a-08-y``, ``a-09-x`` …

    Raises:
        UserError: braces hold neither a list nor an ascending range.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(limits[1]), int(limits[2])
        padded = limits[1].startswith("0") or limits[2].startswith("0")
        width = max(len(limits[1]), len(limits[2])) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",")
    if not choices or (len(choices) == 1 and not limits):
        raise UserError(
            f"{pattern}: {{{inside}}} is neither a range such as {{0000..1023}} nor a list"
        )
    before, after = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [before + choice + rest for choice in choices for rest in after]
