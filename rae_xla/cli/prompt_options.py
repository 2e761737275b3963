"""Options of the verbs that use a text-to-image model, and how they resolve it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rae_xla.cli.options import NumberAction, PathAction
from rae_xla.config.paths import LOCAL, PathRule
from rae_xla.config.ranges import COUNT
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.sample.text_to_image_lookup import ResolvedTextToImage

MODEL_HELP = (
    "a published model (scale-rae-qwen1.5b, scale-rae-qwen1.5b-webssl, scale-rae-qwen7b), a "
    "results folder of `rae-xla train t2i`, or a folder or hub id in the layout of Scale-RAE"
)


def add_model(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Declare ``--model`` and ``--rae``."""
    parser.add_argument(
        "--model",
        action=PathAction,
        rule=PathRule(hub=True),
        required=required,
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument(
        "--rae",
        action=PathAction,
        rule=PathRule(remote=False, hub=True),
        metavar="MODEL",
        help="autoencoder of a saved model: a folder or hub id that save_pretrained wrote",
    )


def add_text_to_image(parser: argparse.ArgumentParser) -> None:
    """Declare the options of text-to-image models."""
    group = parser.add_argument_group("text-to-image")
    group.add_argument(
        "--tokenizer",
        action=PathAction,
        rule=LOCAL,
        metavar="FOLDER",
        help="folder of tokenizer.json (default: that of the model)",
    )
    group.add_argument(
        "--request",
        metavar="TEXT",
        help="how a prompt is asked for, with {caption} in its place, such as 'Generate an image "
        "of {caption}' (default: the first of captions.prompts of the run, or {caption})",
    )
    group.add_argument(
        "--write-text",
        action=argparse.BooleanOptionalAction,
        help="let the model answer in text until it starts an image itself (default: only "
        "published models do)",
    )


def add_best_of(parser: argparse.ArgumentParser) -> None:
    """Declare ``--best-of`` and what it selects by."""
    group = parser.add_argument_group("best of N")
    group.add_argument(
        "--best-of",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="generate N images for each one that is kept, and keep those with the best scores",
    )
    group.add_argument(
        "--select",
        metavar="HOW",
        help="lm-likelihood (default), lm-yes, clip, or command:PROGRAM ARGUMENTS",
    )
    group.add_argument(
        "--clip",
        action=PathAction,
        rule=PathRule(remote=False, hub=True),
        metavar="FOLDER",
        help="CLIP for --select clip, a folder or hub id of transformers",
    )


def resolve(args: argparse.Namespace, overrides: Sequence[str] = ()) -> ResolvedTextToImage:
    """Resolve the model of a command line that has the options above.

    Args:
        args: parsed arguments.
        overrides: settings besides those of the command line.

    Raises:
        UserError: there is no such model.
    """
    from rae_xla.sample.text_to_image_lookup import resolve_text_to_image

    if args.model is None:
        raise UserError(f"prompts need a text-to-image model: give --model, {MODEL_HELP}")
    return resolve_text_to_image(
        args.model,
        [*args.overrides, *overrides],
        rae=args.rae,
        tokenizer=args.tokenizer,
        request=getattr(args, "request", None),
        write_text=getattr(args, "write_text", None),
    )
