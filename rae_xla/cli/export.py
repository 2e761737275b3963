"""``rae-xla export decoder``: a stage-1 checkpoint's decoder as a file of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla.cli.options import check_out_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("what", choices=("decoder",), help="what to take out of the checkpoint")
    parser.add_argument(
        "--ckpt", required=True, metavar="PATH", help="checkpoint, or a results folder"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="default: ema")


def run(args: argparse.Namespace) -> int:
    """Write the bare decoder."""
    from rae_xla.interop.checkpoint_tensors import find_weights
    from rae_xla.interop.decoder import export_decoder

    check_out_file(args.out)
    checkpoint = find_weights(args.ckpt, "--ckpt")
    count = export_decoder(checkpoint, args.out, args.weights)
    print(f"{args.out}: decoder of {checkpoint} ({args.weights}), {count:,} parameters")
    return 0
