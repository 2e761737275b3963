"""``rae-xla train``: train a decoder, a diffusion transformer or a text-to-image model."""

from __future__ import annotations

import argparse

from rae_xla.cli.options import (
    PathAction,
    add_config,
    check_not_an_input,
    read_config,
    start_backend,
)
from rae_xla.config.inputs import input_paths
from rae_xla.config.paths import path_setting
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    parser.add_argument(
        "task",
        choices=("stage1", "stage2", "t2i"),
        help="stage1: the decoder; stage2: the diffusion transformer; t2i: the text-to-image model",
    )
    add_config(parser)
    parser.add_argument(
        "--results-dir",
        action=PathAction,
        required=True,
        metavar="DIR",
        help="folder of the run, local or gs://; started again with the same folder, the run "
        "resumes",
    )
    parser.add_argument(
        "--data", action=PathAction, metavar="SHARDS", help="training shards (data.train)"
    )


def run(args: argparse.Namespace) -> int:
    """Train to the last step; returns ``EXIT_STOPPED`` if the run is stopped before."""
    extra = [path_setting("data.train", args.data)] if args.data else []
    config = read_config(args, *extra)
    if config.data.train is None:
        raise UserError("no training data: give --data SHARDS or set data.train=SHARDS")

    from rae_xla.data.mixture import open_training_data
    from rae_xla.train.callbacks.preemption import EXIT_STOPPED
    from rae_xla.train.results_folder import check_folder
    from rae_xla.train.trainer import train

    data = open_training_data(config.data.train, config.data.weights)
    folder = args.results_dir
    check_not_an_input(folder, input_paths(config), "--results-dir")
    check_folder(folder, config, data.fingerprint)
    backend = start_backend(config)
    result = train(config, backend, data, args.task, folder)
    if backend.process_index == 0:
        print(f"checkpoint: {result.checkpoint}")
    return EXIT_STOPPED if result.stopped else 0
