"""Options and start-up steps that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RunConfig
    from rae_xla.runtime import Backend


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare ``--config FILE [key=value ...]``."""
    parser.add_argument("--config", required=required, metavar="FILE", help="YAML file of the run")
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


def check_out_file(path: Path | None, option: str = "--out") -> None:
    """Check that an output file can be written, before the work that produces its content.

    The folder of the file is created.

    Raises:
        UserError: if ``path`` is a folder, or its parent folder cannot be created.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: give the name of a file in it")
    check_out_folder(path.parent, option)


def check_out_folder(path: Path, option: str = "--out") -> None:
    """Create an output folder unless it exists.

    Raises:
        UserError: if a file has its name, or permission is missing.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot create the folder {path}: {error.strerror}") from error
