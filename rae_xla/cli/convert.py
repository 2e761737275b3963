"""``rae-xla convert``: convert weights from one layout to another."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "source",
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
        "--out", required=True, type=Path, metavar="PATH", help="file or new folder to write"
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
        "--config", metavar="FILE", help="YAML file of the run, if SOURCE does not store it"
    )
    parser.add_argument(
        "--stats", type=Path, metavar="FILE", help="add these latent statistics to the autoencoder"
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
    from rae_xla.interop.layouts import write_layout
    from rae_xla.interop.model_source import open_model_source

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
    written = write_layout(
        source,
        args.to,
        args.out,
        transformers=args.transformers,
        other_positions=args.other_positions,
    )
    print(f"{args.out}: {written}")
    return 0
