"""``rae-xla reconstruct``: encode and decode images with the autoencoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

from rae_xla.cli.options import add_config, read_config, start_backend
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--input", required=True, type=Path, metavar="PATH", help="an image, or a folder of images"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="output folder of the PNGs"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="images at a time (default: 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Reconstruct images and print their mean PSNR."""
    config = read_config(args)
    if config.stage_1 is None:
        raise UserError(
            f"{args.config} has no stage_1 section: add it, to describe the autoencoder"
        )
    if not args.input.exists():
        raise UserError(f"--input {args.input} does not exist")

    from rae_xla.interop.instantiate import instantiate
    from rae_xla.models.rae import RAE
    from rae_xla.sample.reconstruct import find_images, reconstruct_files

    images = find_images(args.input)
    backend = start_backend(config)
    rae = cast("RAE", instantiate(config.stage_1)).requires_grad_(False)
    backend.place(rae)
    root = args.input if args.input.is_dir() else args.input.parent
    batch = min(args.batch_size, len(images))
    ratio = reconstruct_files(rae, backend, images, root=root, out=args.out, batch=batch)
    if backend.process_index == 0:
        print(f"{args.out}: {len(images)} reconstructions, mean PSNR {ratio:.2f} dB")
    return 0
