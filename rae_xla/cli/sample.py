"""``rae-xla sample``: generate a set of images, for FID or for viewing."""

from __future__ import annotations

import argparse
import logging

from rae_xla import storage
from rae_xla.cli.options import (
    NumberAction,
    PathAction,
    add_config,
    add_seed,
    check_out_folder,
    read_config,
    start_backend,
)
from rae_xla.cli.prompt_options import add_model, add_text_to_image, resolve
from rae_xla.config.paths import StoragePath, path_setting
from rae_xla.config.ranges import CFG_SCALE, COUNT, GRID_POINTS
from rae_xla.errors import UserError

_SAMPLING = ("cfg_scale", "num_steps", "mode")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser, required=False)
    parser.add_argument(
        "--ckpt",
        action=PathAction,
        metavar="PATH",
        help="stage-2 weights (stage_2.ckpt): a weight file, a checkpoint, or a results folder",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="DIR",
        help="output folder, local or gs://: PNGs, grid.png, samples.npz",
    )
    parser.add_argument(
        "--num-samples",
        "--num-images",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="number of images (default: 100), or of images of each prompt (default: 4)",
    )
    parser.add_argument(
        "--labels",
        default="equal",
        metavar="WHICH",
        help="equal (every class equally often, the default), random, or labels such as 207,360",
    )
    parser.add_argument(
        "--batch-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=100,
        metavar="N",
        help="images at a time over all devices (default: 100)",
    )
    parser.add_argument(
        "--layout",
        choices=("flat", "folders", "tar", "geneval", "dpg"),
        default="flat",
        help="PNGs in one folder (the default), in folders of 1,000, or in tar files of 1,000; "
        "with --prompts flat, geneval or dpg, as these benchmarks read them",
    )
    parser.add_argument(
        "--workers",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=4,
        metavar="N",
        help="threads that write PNGs (default: 4)",
    )
    add_seed(parser, "seed of noise and labels (default: 0)")
    parser.add_argument(
        "--keep-latents",
        action="store_true",
        help="also write latents.npy, for `rae-xla evaluate decoders`",
    )
    prompts = parser.add_argument_group("images of prompts, instead of --config")
    prompts.add_argument(
        "--prompts",
        action=PathAction,
        metavar="FILE",
        help="a prompt a line, JSON lines with prompt (GenEval's evaluation_metadata.jsonl), JSON "
        "of prompts by id, or a folder of text files (DPG-Bench)",
    )
    add_model(prompts, required=False)
    prompts.add_argument(
        "--cfg-scale",
        action=NumberAction,
        accepted=CFG_SCALE,
        type=float,
        metavar="S",
        help="guidance scale",
    )
    prompts.add_argument(
        "--num-steps",
        action=NumberAction,
        accepted=GRID_POINTS,
        type=int,
        metavar="N",
        help="evaluations of the model (default: 50)",
    )
    prompts.add_argument("--mode", choices=("ode", "sde"), help="sampler (default: ode)")
    add_text_to_image(parser)


def run(args: argparse.Namespace) -> int:
    """Generate the images that the folder lacks."""
    if args.prompts is not None:
        return _sample_prompts(args)
    if args.config is None:
        raise UserError("sample needs --config FILE, or --prompts FILE and --model MODEL")
    if args.layout in ("geneval", "dpg"):
        raise UserError(f"--layout {args.layout} is for images of prompts: give --prompts FILE")
    for option in ("model", "rae", "tokenizer", "request", "write_text", *_SAMPLING):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise UserError(f"--{name} belongs to --prompts; write settings as key=value")
    args.num_samples = 100 if args.num_samples is None else args.num_samples

    from rae_xla.checkpoint.tensors import find_weights

    extra = []
    if args.ckpt is not None:
        extra.append(path_setting("stage_2.ckpt", find_weights(args.ckpt, "--ckpt")))
    config = read_config(args, *extra)
    if args.keep_latents and storage.is_remote(args.out):
        raise UserError(
            f"--keep-latents writes one file at many places, which a bucket cannot: give a local "
            f"--out instead of {args.out}"
        )
    check_out_folder(args.out)

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


def _sample_prompts(args: argparse.Namespace) -> int:
    """Generate the images of a file of prompts that the folder lacks."""
    if args.config is not None or args.ckpt is not None:
        raise UserError("--prompts takes its model from --model: remove --config and --ckpt")
    if args.layout in ("folders", "tar"):
        raise UserError(f"--layout {args.layout}: images of prompts are flat, geneval or dpg")
    count = 4 if args.num_samples is None else args.num_samples
    if args.keep_latents and storage.is_remote(args.out):
        raise UserError(
            f"--keep-latents writes one file at many places, which a bucket cannot: give a local "
            f"--out instead of {args.out}"
        )

    from rae_xla.sample.pipeline import sampling_overrides
    from rae_xla.sample.prompt_set import PromptSet, claim_prompt_set, write_prompt_set
    from rae_xla.sample.prompts import read_prompts
    from rae_xla.sample.sample_set import replicated_mesh
    from rae_xla.sample.text_to_image import load_on
    from rae_xla.sample.text_to_image_lookup import download_text_to_image

    images = PromptSet(
        StoragePath(args.out),
        read_prompts(args.prompts),
        count,
        args.seed,
        args.layout,
        args.keep_latents,
    )
    images.files()  # reports what the layout cannot have
    check_out_folder(args.out)
    resolved = resolve(args, sampling_overrides(args.cfg_scale, args.num_steps, args.mode))
    model = download_text_to_image(resolved)
    config = model.config
    backend = start_backend(config, mesh=replicated_mesh(config.mesh), same_bits=True)
    pipeline = load_on(model, backend)
    claim_prompt_set(images, pipeline)
    logger.info("%d images, on %s", images.files().count, backend.description)
    write_prompt_set(images, pipeline, batch=args.batch_size, workers=args.workers)
    if backend.process_index == 0:
        print(f"{args.out}: {images.files().count} images of {len(images.prompts)} prompts")
    return 0
