"""``rae-xla export decoder``: deprecated, now ``rae-xla checkpoints export --what decoder``."""

from __future__ import annotations

import argparse
import logging

from rae_xla.cli.checkpoints import export_decoder_file
from rae_xla.cli.options import PathAction, check_out_file

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("what", choices=("decoder",), help="what to write")
    parser.add_argument(
        "--ckpt",
        action=PathAction,
        required=True,
        metavar="PATH",
        help="checkpoint, or a results folder",
    )
    parser.add_argument(
        "--out", action=PathAction, required=True, metavar="FILE", help="file to write"
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="default: ema")


def run(args: argparse.Namespace) -> int:
    """Write the decoder as a bare state dict."""
    logger.warning(
        "`rae-xla export decoder --ckpt RUN --out FILE` is deprecated and will be removed after "
        "the next release: use `rae-xla checkpoints export RUN --what decoder --out FILE`"
    )
    check_out_file(args.out, inputs=[args.ckpt])
    export_decoder_file(args.ckpt, args.out, args.weights, "--ckpt")
    return 0
