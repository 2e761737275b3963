"""``rae-xla ask``: ask a text-to-image model about an image or a generated latent."""

from __future__ import annotations

import argparse
import sys

from rae_xla.cli.options import NumberAction, PathAction, add_seed
from rae_xla.cli.prompt_options import add_model, resolve
from rae_xla.config.paths import LOCAL
from rae_xla.config.ranges import COUNT, COUNT_OR_ZERO, EPSILON, Range
from rae_xla.errors import UserError

TEMPERATURE = Range(least=0.01, most=1000, also=0)
"""Logits divided by a smaller one are infinite."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model(parser)
    about = parser.add_mutually_exclusive_group()
    about.add_argument("--image", action=PathAction, metavar="FILE", help="image to ask about")
    about.add_argument(
        "--latent",
        action=PathAction,
        metavar="FILE.npy",
        help="generated latent to ask about, which is not decoded: of `generate --save-latents` or "
        "`sample --keep-latents`",
    )
    parser.add_argument(
        "--latent-index",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        default=0,
        metavar="N",
        help="which latent of the file (default: 0)",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    parser.add_argument(
        "--tokenizer",
        action=PathAction,
        rule=LOCAL,
        metavar="FOLDER",
        help="folder of tokenizer.json (default: that of the model)",
    )
    parser.add_argument(
        "--temperature",
        action=NumberAction,
        accepted=TEMPERATURE,
        type=float,
        default=0.0,
        metavar="T",
        help="0: the most likely answer (the default); larger: sampled",
    )
    parser.add_argument(
        "--top-p",
        action=NumberAction,
        accepted=EPSILON,
        type=float,
        default=1.0,
        metavar="P",
        help="with --temperature (default: 1)",
    )
    add_seed(parser, "with --temperature")
    parser.add_argument(
        "--max-new-tokens",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=256,
        metavar="N",
        help="length limit (default: 256)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the model")


def run(args: argparse.Namespace) -> int:
    """Print the answer as it is written."""
    from rae_xla.sample.answers import (
        TokenSampling,
        answer,
        check_answers,
        read_image,
        read_latent,
    )
    from rae_xla.sample.text_to_image import build_text_to_image_pipeline

    sampling = TokenSampling(args.temperature, args.top_p, args.seed)
    if not args.prompt.strip():
        raise UserError("--prompt is empty: write what to ask about the image")
    backend = [] if any(o.startswith("runtime.backend=") for o in args.overrides) else [_TORCH]
    pipeline = build_text_to_image_pipeline(resolve(args, backend))
    check_answers(pipeline)
    features = None
    if args.image is not None:
        features = read_image(pipeline, args.image)
    elif args.latent is not None:
        features = read_latent(pipeline, args.latent, args.latent_index)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    answer(
        pipeline,
        args.prompt,
        features,
        sampling=sampling,
        max_new_tokens=args.max_new_tokens,
        on_text=show,
    )
    print()
    return 0


_TORCH = "runtime.backend=torch"  # an answer grows token by token, which XLA would recompile
