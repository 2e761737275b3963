"""``rae-xla generate``: generate images of named classes or of prompts."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from rae_xla.cli.options import NumberAction, PathAction, add_seed, check_out_folder
from rae_xla.cli.prompt_options import add_best_of, add_text_to_image
from rae_xla.config.paths import LOCAL_OR_HUB, PathRule
from rae_xla.config.ranges import CFG_SCALE, COUNT, FRACTION, GRID_POINTS
from rae_xla.errors import UserError

DEFAULT_MODEL = "ditdh-xl-256"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        action=PathAction,
        rule=PathRule(hub=True),
        metavar="MODEL",
        help="a published model (ditdh-xl-256, the default; ditdh-xl-512; either with "
        "-autoguidance; for prompts scale-rae-qwen1.5b), a YAML file, a results folder of stage 2 "
        "or t2i, or a saved folder or hub id",
    )
    parser.add_argument(
        "--rae",
        action=PathAction,
        rule=LOCAL_OR_HUB,
        metavar="MODEL",
        help="autoencoder of a model that save_pretrained wrote (default: its subfolder rae)",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--class-ids", metavar="N,N", help="classes by label, such as 207,388")
    classes.add_argument(
        "--classes",
        metavar="NAME,NAME",
        help='classes by name, such as "golden retriever,giant panda"',
    )
    classes.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text-to-image: what the images show; may be given several times",
    )
    classes.add_argument(
        "--prompts",
        action=PathAction,
        metavar="FILE",
        help="the same from a file: a prompt a line, JSON lines with prompt, JSON of prompts by "
        "id, or a folder of text files",
    )
    add_text_to_image(parser)
    parser.add_argument(
        "--save-latents",
        action="store_true",
        help="also write the latents of each image, for `rae-xla ask --latent`",
    )
    add_best_of(parser)
    parser.add_argument(
        "--class-names",
        action=PathAction,
        metavar="FILE",
        help="class names by label (default: those of the run's data set, or ImageNet's for a "
        "model of 1,000 classes)",
    )
    parser.add_argument(
        "--num-samples",
        "--num-images",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="number of images (default: 8), or of images of each prompt (default: 1)",
    )
    parser.add_argument(
        "--cfg-scale",
        action=NumberAction,
        accepted=CFG_SCALE,
        type=float,
        metavar="S",
        help="guidance scale; 1 disables guidance (default: the model's)",
    )
    parser.add_argument(
        "--num-steps",
        action=NumberAction,
        accepted=GRID_POINTS,
        type=int,
        metavar="N",
        help="points of the time grid, with prompts evaluations of the model (default: the "
        "model's, usually 50; with --mode sde 250)",
    )
    parser.add_argument(
        "--mode", choices=("ode", "sde"), help="sampler (default: the model's, usually ode)"
    )
    parser.add_argument(
        "--cfg-interval",
        action=NumberAction,
        accepted=FRACTION,
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="guide only between two shifted times, 0 (data) to 1 (noise)",
    )
    add_seed(parser, "seed of the noise (default: 0)")
    parser.add_argument(
        "--batch-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=8,
        metavar="N",
        help="images at a time (default: 8)",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="DIR",
        help="output folder of the PNGs, local or gs://",
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="test the installation with a tiny model of random weights, which generates noise; "
        "nothing is downloaded",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the model, such as runtime.precision=bf16",
    )


def run(args: argparse.Namespace) -> int:
    """Generate images and write them."""
    from rae_xla.sample.generated_folder import check_generated_folder

    check_out_folder(args.out)
    if args.best_of is None:  # best-of-N resumes
        check_generated_folder(args.out)
    if args.cfg_interval:
        low, high = args.cfg_interval
        args.overrides = [*args.overrides, f"guidance.t_min={low}", f"guidance.t_max={high}"]
    if args.prompt or args.prompts:
        from rae_xla.cli.generate_from_prompts import generate_from_prompts

        return generate_from_prompts(args)
    if args.smoke and args.model:
        raise UserError("--smoke uses its own model: remove --model")
    for option in ("tokenizer", "request", "write_text", "save_latents", "best_of"):
        if getattr(args, option):
            raise UserError(
                f"--{option.replace('_', '-')} is for text-to-image models: give --prompt too"
            )
    args.num_samples = 8 if args.num_samples is None else args.num_samples
    if not args.smoke:
        return _generate(args, args.model or DEFAULT_MODEL)
    from rae_xla.sample.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        return _generate(args, str(write_tiny_model(Path(folder))))


def _generate(args: argparse.Namespace, model: str) -> int:
    from rae_xla.data.class_names import imagenet_names, read_class_names
    from rae_xla.progress import log_only_on_first_process, progress_bar
    from rae_xla.sample.generated_folder import GRID_FILE, write_generated_folder
    from rae_xla.sample.labels import choose_labels
    from rae_xla.sample.model_lookup import resolve_class_names, resolve_model
    from rae_xla.sample.pipeline import build_pipeline, sampling_overrides
    from rae_xla.sample.text_to_image_lookup import is_text_to_image

    if is_text_to_image(model):
        raise UserError(f"{model} generates images from prompts: give --prompt TEXT")
    # Check everything that the user may have mistyped before gigabytes are downloaded.
    settings = sampling_overrides(args.cfg_scale, args.num_steps, args.mode)
    resolved = resolve_model(model, [*args.overrides, *settings], args.rae)
    given = imagenet_names() if args.smoke else None
    if args.class_names:
        given = read_class_names(args.class_names)
    names = resolve_class_names(resolved, given)
    labels = choose_labels(_requested_classes(args), names, args.num_samples, args.seed)
    pipeline = build_pipeline(resolved, names)
    backend, config = pipeline.sampler.backend, pipeline.config
    log_only_on_first_process(backend.process_index)
    first = backend.process_index == 0
    guidance = config.guidance
    guided = f"{guidance.method} {guidance.scale:g}" if guidance.scale > 1 else "no guidance"
    logger.info(
        "%d images, %s, seed %d, on %s", len(labels), guided, args.seed, backend.description
    )
    with progress_bar(desc="sampling", unit="step", disable=not first) as bar:

        def report(done: int, steps: int) -> None:
            bar.total = steps
            bar.update(done - bar.n)

        pixels = pipeline.generate(
            labels, seed=args.seed, batch_size=args.batch_size, progress=report
        )
    if first:
        write_generated_folder(
            args.out,
            pixels,
            labels,
            names,
            {
                "model": "random weights" if args.smoke else model,
                "seed": args.seed,
                "sampler": config.to_dict()["sampler"],
                "guidance": {"method": guidance.method, "scale": guidance.scale},
            },
        )
        print(f"{args.out}: {len(labels)} PNGs and {GRID_FILE}")
        if args.smoke:
            print(
                "This was a test of the installation: the model is tiny and its weights are "
                "random, so the images are noise. Without --smoke, a published model is used."
            )
    return 0


def _requested_classes(args: argparse.Namespace) -> list[str | int]:
    """Parse ``--class-ids`` or ``--classes``; return an empty list if neither is given."""
    if args.class_ids is not None:
        try:
            return [int(text) for text in args.class_ids.split(",")]
        except ValueError:
            raise UserError(
                f"--class-ids {args.class_ids}: expected labels such as 207,388; give names with "
                "--classes"
            ) from None
    if args.classes is not None:
        names = [name.strip() for name in args.classes.split(",")]
        if not all(names):
            raise UserError(f"--classes {args.classes!r}: expected names separated by commas")
        return list(names)
    return []
