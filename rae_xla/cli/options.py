"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """``--config FILE [key=value ...]``."""
    parser.add_argument("--config", required=required, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's, such as training.epochs=2",
    )


def check_out_file(path: Path | None, option: str = "--out") -> None:
    """Find out that a file cannot be written before the work whose result it is to hold.

    Raises:
        UserError: it is a folder, or its own folder cannot be made.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give the name of a file in it")
    check_out_folder(path.parent, option)


def check_out_folder(path: Path, option: str = "--out") -> None:
    """Make a folder, or say why it cannot be.

    Raises:
        UserError: there is a file in its place, or it may not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: the folder {path} cannot be made: {error.strerror}") from error


def read_config(args: argparse.Namespace, *extra: str) -> RunConfig:
    """The configuration these options describe; ``extra`` are further overrides."""
    from rae_xla.config import load_config

    return load_config(args.config, overrides=[*args.overrides, *extra])
