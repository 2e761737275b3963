"""``rae-xla convert``: weights from one layout to another."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=".pt or .safetensors file, checkpoint or results folder, diffusers folder, folder of "
        "save_pretrained, hub id of one, published name, or a run's YAML",
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=("published", "safetensors", "diffusers", "pretrained"),
        help="published: .pt of the papers' layout (of a whole autoencoder: a folder of them); "
        "diffusers: an AutoencoderRAE's folder; pretrained: a folder for from_pretrained",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="PATH", help="file or new folder to write"
    )
    parser.add_argument(
        "--part",
        choices=("rae", "decoder", "stage2", "discriminator", "stats"),
        help="what to take out of SOURCE (default: all of the model it is)",
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="of a checkpoint; default: ema"
    )
    parser.add_argument("--config", metavar="FILE", help="the run's YAML, if SOURCE has none in it")
    parser.add_argument(
        "--stats", type=Path, metavar="FILE", help="latent statistics that the autoencoder gets"
    )
    parser.add_argument(
        "--transformers",
        type=int,
        choices=(4, 5),
        default=4,
        help="with --to diffusers: the transformers release it will be used with (default: 4, the "
        "names of the published repositories)",
    )
    parser.add_argument(
        "--other-positions",
        action="store_true",
        help="with --to diffusers: write it although diffusers decodes with other positions",
    )
    parser.add_argument(
        "--as-diffusers",
        action="store_true",
        help="of a diffusers folder: keep its position table and second epsilon",
    )
    parser.add_argument(
        "--ignore-manifest", action="store_true", help="convert parts that do not belong together"
    )


def run(args: argparse.Namespace) -> int:
    """Read, say what it is, write."""
    from rae_xla.interop.conversion import open_any, write_as

    opened = open_any(
        args.source,
        part=args.part,
        weights=args.weights,
        config=args.config,
        statistics=args.stats,
        as_diffusers=args.as_diffusers,
        check=not args.ignore_manifest,
    )
    print(f"{args.source}: {opened.about}")
    for note in opened.notes:
        print(f"note: {note}")
    done = write_as(
        opened,
        args.to,
        args.out,
        transformers=args.transformers,
        other_positions=args.other_positions,
    )
    print(f"{args.out}: {done}")
    return 0
