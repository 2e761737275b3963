"""Which tar files a user means: a folder, one file, or a pattern such as ``x-{0000..1023}.tar``."""

from __future__ import annotations

import re

from rae_xla.data import storage
from rae_xla.data.shard_journal import WRITING_FILE
from rae_xla.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")


def tar_files(source: str) -> list[str]:
    """The paths of the tar files that ``source`` names; those of a folder sorted by name.

    Raises:
        UserError: if there are none, some of them do not exist, or the folder is being written.
    """
    if not is_tar_pattern(source):
        if not storage.is_folder(source):
            raise UserError(f"{source}: no such folder or tar file")
        present = storage.list_files(source)
        if WRITING_FILE in present:
            raise UserError(
                f"{source}: shards are being written here, or their writing was interrupted: run "
                "`rae-xla shards make` to its end first"
            )
        names = sorted(n for n in present if n.lower().endswith(".tar") and n[0] != ".")
        if not names:
            raise UserError(f"{source}: there is no .tar file in this folder")
        return [storage.join(source, name) for name in names]
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
            f"{', '.join(missing[:3])}{more}: no such file; correct the name, or copy what is "
            "missing"
        )
    return paths


def is_tar_pattern(source: str) -> bool:
    """Whether ``source`` names tar files rather than a folder of them."""
    return source.lower().endswith(".tar") and (
        bool(_BRACES.search(source)) or not storage.is_folder(source)
    )


def expand_braces(pattern: str) -> list[str]:
    """``a-{08..10}-{x,y}`` -> ``a-08-x``, ``a-08-y``, ``a-09-x`` …, as a shell would.

    Raises:
        UserError: if braces hold neither a list nor a range that ascends.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
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
    before, after = pattern[: found.start()], expand_braces(pattern[found.end() :])
    return [before + choice + rest for choice in choices for rest in after]
