"""Options that several verbs share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config FILE [key=value ...]``."""
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's, such as training.epochs=2",
    )


def read_config(args: argparse.Namespace, *extra: str) -> RunConfig:
    """The configuration these options describe; ``extra`` are further overrides."""
    from rae_xla.config import load_config

    return load_config(args.config, overrides=[*args.overrides, *extra])
