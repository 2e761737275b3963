"""``rae-xla sample``: a set of pictures for people and for FID."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla.cli.options import add_config, read_config
from rae_xla.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--ckpt",
        metavar="PATH",
        help="weights of stage 2 (stage_2.ckpt): a file, a checkpoint, or a results folder",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder of the PNGs, grid and .npz"
    )
    parser.add_argument("--num-samples", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument(
        "--labels",
        default="equal",
        metavar="WHICH",
        help="equal (the default), random, or class numbers such as 207,360",
    )
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--keep-latents",
        action="store_true",
        help="also write latents.npy, for `rae-xla evaluate decoders`",
    )


def run(args: argparse.Namespace) -> int:
    """Draw what is not in the folder yet."""
    from rae_xla.interop.checkpoint_tensors import find_weights

    extra = [f"stage_2.ckpt={find_weights(args.ckpt, '--ckpt')}"] if args.ckpt else []
    config = read_config(args, *extra)
    if args.num_samples < 1 or args.batch_size < 1:
        raise UserError("--num-samples and --batch-size must be at least 1")

    from rae_xla.runtime import start
    from rae_xla.sample.generate import load_sampler
    from rae_xla.sample.labels import make_labels
    from rae_xla.sample.sample_set import claim_set, write_set

    labels = make_labels(args.labels, args.num_samples, config.misc.num_classes, args.seed)
    keep = {"keep_latents": args.keep_latents}
    claim_set(args.out, config, labels=args.labels, seed=args.seed, count=args.num_samples, **keep)
    runtime = start(config.runtime, config.mesh, seed=config.training.global_seed)
    sampler = load_sampler(config, runtime)
    guidance = config.guidance
    how = f"{guidance.method} {guidance.scale:g}" if guidance.scale > 1 else "no guidance"
    speaks = runtime.process_index == 0
    if speaks:
        print(f"{args.num_samples} samples, {how}, on {runtime.description}")
    batch = min(args.batch_size, args.num_samples)
    written = write_set(sampler, labels, seed=args.seed, batch=batch, out=args.out, **keep)
    if speaks:
        print(f"{written}")
    return 0
