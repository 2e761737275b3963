"""Options and start-up steps that several verbs share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla import storage
from rae_xla.config.paths import ANYWHERE, LOCAL, PathRule, parse_path
from rae_xla.config.ranges import SEED, Range
from rae_xla.errors import UserError
from rae_xla.storage.staging import check_writable

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RunConfig
    from rae_xla.runtime import Backend


class PathAction(argparse.Action):
    """Stores paths in their normal form, ``StoragePath``: ``action=PathAction, rule=LOCAL``.

    Args:
        rule: which paths the argument accepts.
        **options: those of every argument.

    Raises:
        UserError: when it is called with a path that the rule excludes.
    """

    # An action rather than a ``type``: argparse replaces the message of an error in a type.
    def __init__(self, *args: Any, rule: PathRule = ANYWHERE, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rule = rule

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Store the path, or each of several."""
        what = option_string or str(self.metavar or self.dest)
        stored: Any = values
        if isinstance(values, str):
            stored = parse_path(values, what, self._rule)
        elif values is not None:
            stored = [parse_path(value, what, self._rule) for value in values]
        setattr(namespace, self.dest, stored)


class NumberAction(argparse.Action):
    """Stores numbers of a range: ``action=NumberAction, accepted=COUNT, type=int``.

    Args:
        accepted: the range.
        **options: those of every argument.

    Raises:
        UserError: when it is called with a number outside of the range.
    """

    # An action for the same reason as PathAction.
    def __init__(self, *args: Any, accepted: Range, **options: Any) -> None:
        super().__init__(*args, **options)
        self._accepted = accepted

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the number, or each of several."""
        for number in values if isinstance(values, list) else [values]:
            if not self._accepted.contains(number):
                expected = self._accepted.describe(number)
                shown = f"{number:g}" if isinstance(number, float) else number
                raise UserError(f"{option_string} {shown}: expected {expected}")
        setattr(namespace, self.dest, values)


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare ``--config FILE [key=value ...]``."""
    parser.add_argument(
        "--config",
        action=PathAction,
        rule=LOCAL,
        required=required,
        metavar="FILE",
        help="YAML file of the run",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as training.epochs=2",
    )


def read_config(args: argparse.Namespace, *extra: str) -> RunConfig:
    """Load the configuration that ``--config`` and its overrides describe.

    Args:
        args: parsed arguments of a verb that called ``add_config``.
        extra: further ``key=value`` overrides; they win.
    """
    from rae_xla.config import load_config

    return load_config(args.config, overrides=[*args.overrides, *extra])


def add_seed(parser: argparse.ArgumentParser | argparse._ArgumentGroup, description: str) -> None:
    """Declare ``--seed``, 0 by default."""
    parser.add_argument(
        "--seed",
        action=NumberAction,
        accepted=SEED,
        type=int,
        default=0,
        metavar="N",
        help=description,
    )


def move_settings_to_overrides(args: argparse.Namespace, option: str) -> None:
    """Move ``key=value`` arguments from an option with several values to the overrides.

    argparse takes settings that follow such an option as its values.
    """
    values = getattr(args, option)
    if values is not None:
        # A path that has an equals sign, such as out/cfg=4, is no setting.
        settings = [value for value in values if re.match(r"[\w.]+=", value)]
        setattr(args, option, [value for value in values if value not in settings])
        args.overrides = [*args.overrides, *settings]
        if not getattr(args, option):
            raise UserError(f"--{option} needs at least one value")


def start_backend(
    config: RunConfig, *, mesh: MeshConfig | None = None, same_bits: bool = False
) -> Backend:
    """Start the backend of a run; from then on only process 0 logs below WARNING.

    Args:
        config: of the run; its ``training.global_seed`` seeds torch's generator.
        mesh: instead of ``config.mesh``.
        same_bits: see ``rae_xla.runtime.start``.

    Raises:
        UserError: if the backend is not installed or the mesh does not fit the devices.
    """
    from rae_xla.progress import log_only_on_first_process
    from rae_xla.runtime import start

    backend = start(
        config.runtime,
        config.mesh if mesh is None else mesh,
        seed=config.training.global_seed,
        same_bits=same_bits,
    )
    log_only_on_first_process(backend.process_index)
    return backend


def check_out_file(
    path: str | Path | None, option: str = "--out", *, inputs: Sequence[str | None] = ()
) -> None:
    """Check that an output file can be written, before the work that produces its content.

    The folder of the file is created.

    Args:
        path: the file; None if the command writes none.
        option: that gave it, for error messages.
        inputs: files and folders that the command reads, None for those that were not given.

    Raises:
        UserError: if ``path`` is a folder or an input, or nothing can be written next to it.
    """
    if path is None:
        return
    check_not_an_input(path, inputs, option)
    if not storage.is_remote(str(path)) and storage.is_folder(str(path)):
        raise UserError(f"{option} {path} is a folder: give the name of a file in it")
    check_out_folder(storage.split(str(path))[0], option)


def check_not_an_input(
    path: str | Path, inputs: Sequence[str | None], option: str = "--out"
) -> None:
    """Check that an output would not replace an input.

    Raises:
        UserError: if it is the same file or folder, whatever its spelling, or a file of which the
            input folder consists.
    """
    for source in inputs:
        if source is None:
            continue
        if storage.real_path(str(path)) == storage.real_path(source):
            raise UserError(
                f"{option} {path} is also an input, which it would replace: give another name"
            )
        if _is_part(str(path), source):
            raise UserError(
                f"{option} {path} is a file of the input {source}, which it would replace: give "
                "another name"
            )


_OUTPUT_SUFFIXES = (".html", ".json", ".pt")
_PARTS = ("averages", "classes", "config", "generated", "index", "manifest", "settings", "texts")
"""Names of the JSON files that shards, runs, checkpoints, sample sets and models consist of."""


def _is_part(path: str, folder: str) -> bool:
    """Return whether a file exists in a folder, and is not an output that is written again."""
    if not storage.is_within(path, folder) or not storage.exists(path) or storage.is_folder(path):
        return False
    parent, name = storage.split(path)
    stem, suffix = os.path.splitext(name)
    is_output = suffix in _OUTPUT_SUFFIXES and stem not in _PARTS
    return not (is_output and storage.real_path(parent) == storage.real_path(folder))


def check_new_folder(path: str | Path, option: str = "--out") -> None:
    """Check that an output folder can be written, and is empty or does not exist.

    Raises:
        UserError: it is a file, or has files, or nothing can be written next to it.
    """
    name = str(path)
    if storage.exists(name) and (
        not storage.is_folder(name) or storage.list_files(name) or storage.list_folders(name)
    ):
        raise UserError(f"{option} {path} already exists: give another name, or remove it")
    check_out_folder(storage.split(name)[0], option)


def check_out_folder(path: str | Path, option: str = "--out") -> None:
    """Create an output folder unless it exists, and check that files can be written to it.

    Raises:
        UserError: if a file has its name, permission is missing, or its bucket cannot be reached.
    """
    try:
        check_writable(str(path))
    except OSError as error:
        raise UserError(
            f"{option}: cannot write to the folder {path}: {error.strerror or error}"
        ) from error
