"""``rae-xla sample``: generate a set of images, for FID or for viewing."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from rae_xla.cli.options import add_config, read_config, start_backend
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--ckpt",
        metavar="PATH",
        help="stage-2 weights (stage_2.ckpt): a weight file, a checkpoint, or a results folder",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="output folder: PNGs, grid.png, samples.npz",
    )
    parser.add_argument(
        "--num-samples", type=int, default=100, metavar="N", help="number of images (default: 100)"
    )
    parser.add_argument(
        "--labels",
        default="equal",
        metavar="WHICH",
        help="equal (every class equally often, the default), random, or labels such as 207,360",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=100,
        metavar="N",
        help="images at a time over all devices (default: 100)",
    )
    parser.add_argument(
        "--layout",
        choices=("flat", "folders", "tar"),
        default="flat",
        help="PNGs in one folder (the default), in folders of 1,000, or in tar files of 1,000",
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads that write PNGs (default: 4)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of noise and labels (default: 0)"
    )
    parser.add_argument(
        "--keep-latents",
        action="store_true",
        help="also write latents.npy, for `rae-xla evaluate decoders`",
    )


def run(args: argparse.Namespace) -> int:
    """Generate the images that the folder lacks."""
    from rae_xla.checkpoint.tensors import find_weights

    extra = [f"stage_2.ckpt={find_weights(args.ckpt, '--ckpt')}"] if args.ckpt else []
    config = read_config(args, *extra)
    if min(args.num_samples, args.batch_size, args.workers) < 1:
        raise UserError("--num-samples, --batch-size and --workers must be at least 1")

    from rae_xla.sample.labels import make_labels
    from rae_xla.sample.sample_set import claim_set, replicated_mesh, write_set
    from rae_xla.sample.sampler import load_sampler

    labels = make_labels(args.labels, args.num_samples, config.misc.num_classes, args.seed)
    backend = start_backend(config, mesh=replicated_mesh(config.mesh), same_bits=True)
    options = {"seed": args.seed, "keep_latents": args.keep_latents, "layout": args.layout}
    claim_set(args.out, config, backend, labels=args.labels, count=args.num_samples, **options)
    sampler = load_sampler(config, backend)
    guidance = config.guidance
    guided = f"{guidance.method} {guidance.scale:g}" if guidance.scale > 1 else "no guidance"
    logger.info("%d samples, %s, on %s", args.num_samples, guided, backend.description)
    batch = min(args.batch_size, args.num_samples)
    path = write_set(sampler, labels, batch=batch, out=args.out, workers=args.workers, **options)
    if backend.process_index == 0:
        print(path)
    return 0
