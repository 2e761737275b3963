"""``rae-xla convert``: convert weights from one layout to another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rae_xla import storage
from rae_xla.cli.options import (
    PathAction,
    check_new_folder,
    check_not_an_input,
    check_out_folder,
)
from rae_xla.config.inputs import input_paths
from rae_xla.config.paths import LOCAL, PathRule
from rae_xla.errors import UserError
from rae_xla.storage.staging import staged_output

if TYPE_CHECKING:
    from rae_xla.interop.model_source import ModelSource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "source",
        action=PathAction,
        rule=PathRule(hub=True),
        metavar="SOURCE",
        help=".pt or .safetensors file, checkpoint or results folder, diffusers folder, folder "
        "from save_pretrained, hub id of one, published name, or YAML file of a run",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("published", "safetensors", "diffusers", "pretrained"),
        help="published: a .pt file as in the papers' code (for a complete autoencoder, a folder "
        "of files); diffusers: a folder for AutoencoderRAE; pretrained: a folder for "
        "from_pretrained",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="PATH",
        help="file or new folder to write, local or gs://",
    )
    parser.add_argument(
        "--part",
        choices=("rae", "decoder", "stage2", "discriminator", "stats"),
        help="convert only this part of SOURCE (default: all of it)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="which weights of a checkpoint (default: ema)",
    )
    parser.add_argument(
        "--config",
        action=PathAction,
        rule=LOCAL,
        metavar="FILE",
        help="YAML file of the run, if SOURCE does not store it",
    )
    parser.add_argument(
        "--stats",
        action=PathAction,
        rule=LOCAL,
        metavar="FILE",
        help="add these latent statistics to the autoencoder",
    )
    parser.add_argument(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=4,
        help="with --to diffusers: the major version of transformers that will read the folder "
        "(default: 4, as in the published repositories)",
    )
    parser.add_argument(
        "--other-positions",
        action="store_true",
        help="with --to diffusers: write the folder even if diffusers uses another position table",
    )
    parser.add_argument(
        "--as-diffusers",
        action="store_true",
        help="for a diffusers folder: keep diffusers' position table and second epsilon",
    )
    parser.add_argument(
        "--ignore-manifest", action="store_true", help="do not verify that parts match"
    )


def run(args: argparse.Namespace) -> int:
    """Read SOURCE, print what it is, and write it."""
    from rae_xla.config import load_config
    from rae_xla.interop.layouts import write_layout
    from rae_xla.interop.model_source import open_model_source

    given = [args.source, args.config, args.stats]
    for file in (args.source, args.config):
        if file is not None and file.endswith((".yaml", ".yml")) and not storage.is_remote(file):
            given += input_paths(load_config(file))
    check_not_an_input(args.out, given)
    source = open_model_source(
        args.source,
        part=args.part,
        weights=args.weights,
        config=args.config,
        statistics=args.stats,
        as_diffusers=args.as_diffusers,
        check=not args.ignore_manifest,
    )
    print(f"{args.source}: {source.description}")
    for note in source.notes:
        print(f"note: {note}")
    if storage.is_remote(args.out):
        _check_remote_output(args, source)
    with staged_output(args.out) as out:
        written = write_layout(
            source,
            args.to,
            out,
            transformers=args.transformers,
            other_positions=args.other_positions,
        )
    print(f"{args.out}: {written}")
    return 0


def _check_remote_output(args: argparse.Namespace, source: ModelSource) -> None:
    """Raise ``UserError`` unless the output may be written to a bucket."""
    if args.to == "published" and source.components is not None:
        raise UserError(
            f"--out {args.out}: the stage_1.yaml of a complete autoencoder refers to files by "
            "local path: give a local folder"
        )
    if args.to in ("diffusers", "pretrained"):
        check_new_folder(args.out)
    else:
        check_out_folder(storage.split(args.out)[0])
