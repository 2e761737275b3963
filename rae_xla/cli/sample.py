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
    parser.add_argument(
        "--layout",
        choices=("flat", "folders", "tar"),
        default="flat",
        help="PNGs in one folder (the default), in folders of 1,000, or in tar files of 1,000",
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that write PNGs; default: 4"
    )
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
    if min(args.num_samples, args.batch_size, args.workers) < 1:
        raise UserError("--num-samples, --batch-size and --workers must be at least 1")

    from rae_xla.runtime import start
    from rae_xla.sample.generate import load_sampler
    from rae_xla.sample.labels import make_labels
    from rae_xla.sample.sample_set import claim_set, whole_on_every_device, write_set

    labels = make_labels(args.labels, args.num_samples, config.misc.num_classes, args.seed)
    mesh = whole_on_every_device(config.mesh)
    runtime = start(config.runtime, mesh, seed=config.training.global_seed, same_bits=True)
    how = {"seed": args.seed, "keep_latents": args.keep_latents, "layout": args.layout}
    claim_set(args.out, config, runtime, labels=args.labels, count=args.num_samples, **how)
    sampler = load_sampler(config, runtime)
    guidance = config.guidance
    guided = f"{guidance.method} {guidance.scale:g}" if guidance.scale > 1 else "no guidance"
    speaks = runtime.process_index == 0
    if speaks:
        print(f"{args.num_samples} samples, {guided}, on {runtime.description}")
    batch = min(args.batch_size, args.num_samples)
    written = write_set(sampler, labels, batch=batch, out=args.out, workers=args.workers, **how)
    if speaks:
        print(f"{written}")
    return 0
