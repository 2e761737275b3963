"""``rae-xla train stage1|stage2``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla.cli.options import add_config, read_config
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("stage", choices=("stage1", "stage2"), help="decoder or diffusion model")
    add_config(parser)
    parser.add_argument(
        "--results-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="the run's folder, local; started again, the run goes on where it stopped",
    )
    parser.add_argument("--data", metavar="SHARDS", help="training shards (data.train)")


def run(args: argparse.Namespace) -> int:
    """Train until the configured end, or until told to stop (status ``EXIT_STOPPED``)."""
    extra = [f"data.train={args.data}"] if args.data else []
    config = read_config(args, *extra)
    if config.data.train is None:
        raise UserError("no training data: give --data SHARDS or data.train=SHARDS")

    from rae_xla.data.mixture import open_training_data
    from rae_xla.runtime import start
    from rae_xla.train.folder import check_folder, claim_folder, hold_folder
    from rae_xla.train.loop import train
    from rae_xla.train.survival import EXIT_STOPPED

    data = open_training_data(config.data.train, config.data.weights)
    folder = args.results_dir
    check_folder(folder, config, data.fingerprint)
    runtime = start(config.runtime, config.mesh, seed=config.training.global_seed)
    with hold_folder(folder, runtime):
        claim_folder(folder, config, data.fingerprint, data.sources[0].class_names)
        outcome = train(config, runtime, data, args.stage, folder)
    if runtime.process_index == 0:
        print(f"checkpoint: {outcome.checkpoint}")
    return EXIT_STOPPED if outcome.stopped else 0
