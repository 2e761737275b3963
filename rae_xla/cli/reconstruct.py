"""``rae-xla reconstruct``: encode and decode images with the autoencoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

from rae_xla.cli.options import NumberAction, PathAction, add_config, read_config, start_backend
from rae_xla.config.paths import LOCAL
from rae_xla.config.ranges import COUNT
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--input",
        action=PathAction,
        rule=LOCAL,
        required=True,
        metavar="PATH",
        help="an image, or a folder of images",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        rule=LOCAL,
        required=True,
        metavar="DIR",
        help="local output folder of the PNGs",
    )
    parser.add_argument(
        "--batch-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=16,
        metavar="N",
        help="images at a time (default: 16)",
    )


def run(args: argparse.Namespace) -> int:
    """Reconstruct images and print their mean PSNR."""
    config = read_config(args)
    if config.stage_1 is None:
        raise UserError(
            f"{args.config} has no stage_1 section: add it, to describe the autoencoder"
        )
    source, out = Path(args.input), Path(args.out)
    if not source.exists():
        raise UserError(f"--input {args.input} does not exist")

    from rae_xla.interop.instantiate import instantiate
    from rae_xla.models.rae import RAE
    from rae_xla.sample.reconstruct import (
        check_outputs,
        find_images,
        output_names,
        reconstruct_files,
    )

    images = find_images(source)
    root = source if source.is_dir() else source.parent
    check_outputs(images, source, out)
    output_names(images, root)  # raises if two would be the same
    backend = start_backend(config)
    rae = cast("RAE", instantiate(config.stage_1)).requires_grad_(False)
    backend.place(rae)
    batch = min(args.batch_size, len(images))
    ratio = reconstruct_files(rae, backend, images, root=root, out=out, batch=batch)
    if backend.process_index == 0:
        print(f"{args.out}: {len(images)} reconstructions, mean PSNR {ratio:.2f} dB")
    return 0
