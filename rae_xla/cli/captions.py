"""Options of ``rae-xla shards`` for images with captions, and the commands that use them."""

from __future__ import annotations

import argparse

from rae_xla import storage
from rae_xla.cli.options import NumberAction, PathAction
from rae_xla.config.ranges import COUNT, COUNT_OR_ZERO, FINITE, Range
from rae_xla.data.shards.captioned import (
    CONVERSATION_FILES,
    index_captioned,
    index_conversations,
)
from rae_xla.data.shards.captioned_tar import holds_captions
from rae_xla.data.shards.index import INDEX_FILE
from rae_xla.data.shards.sample_filter import SampleFilter, describe_dropped
from rae_xla.data.shards.tars import is_tar, is_tar_pattern, tar_files
from rae_xla.data.shards.texts import has_texts
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar


def add_captions(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``shards captions``, another name of ``index --captions``."""
    parser.add_argument(
        "source",
        action=PathAction,
        metavar="SHARDS",
        help="a folder of .tar files, one .tar file, or a pattern such as x-{0000..1023}.tar, or a "
        ".jsonl file of conversations; local or gs://",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="FOLDER",
        help="folder of the index; it may be that of the tars",
    )
    add_workers(parser, "number of processes that read")
    add_index_options(parser)
    add_filter_options(parser)
    parser.set_defaults(captions=True)


def add_workers(parser: argparse.ArgumentParser, description: str) -> None:
    """Declare ``--workers``."""
    parser.add_argument(
        "--workers",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        default=1,
        metavar="N",
        help=f"{description} (default: 1)",
    )


def add_index_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that only an index of captions has."""
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--sidecar",
        action=PathAction,
        metavar="FILE",
        help="JSON Lines file with captions by the key of their sample",
    )
    group.add_argument(
        "--images",
        action=PathAction,
        metavar="FOLDER",
        help="folder of the images that a .jsonl file names (default: that of the file)",
    )


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    """Declare which samples with captions are taken."""
    group = parser.add_argument_group("samples with captions")
    group.add_argument(
        "--min-side",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        default=0,
        metavar="PIXELS",
        help="smallest shorter side",
    )
    group.add_argument(
        "--max-aspect",
        action=NumberAction,
        accepted=Range(least=1, most=1e6),
        type=float,
        metavar="RATIO",
        help="largest ratio of the sides",
    )
    group.add_argument(
        "--min-chars",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        default=1,
        metavar="N",
        help="shortest caption (default: 1)",
    )
    group.add_argument(
        "--max-chars",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="longest caption",
    )
    group.add_argument(
        "--score",
        metavar="FIELD",
        help="where a score is, such as json.aesthetic; samples without it are left out",
    )
    group.add_argument(
        "--min-score",
        action=NumberAction,
        accepted=FINITE,
        type=float,
        default=0.0,
        metavar="X",
        help="smallest score (default: 0)",
    )


def sample_filter(args: argparse.Namespace) -> SampleFilter:
    """Return the filter that the options describe."""
    return SampleFilter(
        min_side=args.min_side,
        max_aspect=args.max_aspect,
        min_chars=args.min_chars,
        max_chars=args.max_chars,
        score=args.score,
        min_score=args.min_score,
    )


def wants_captions(args: argparse.Namespace) -> bool:
    """Return whether the source is to be read as images with captions.

    That is so with ``--captions``, for a file of conversations, for an index that has captions, and
    for tars whose first members are texts and images without labels.
    """
    source = str(args.source)
    if args.captions is not None:
        return bool(args.captions)
    if source.endswith(CONVERSATION_FILES):
        return True
    if not (storage.is_remote(source) or storage.exists(source) or is_tar_pattern(source)):
        return False
    if source.endswith(".json"):
        return has_texts(storage.split(source)[0])
    if is_tar_pattern(source) or (storage.is_folder(source) and _has_tars(source)):
        if not is_tar_pattern(source) and storage.exists(storage.join(source, INDEX_FILE)):
            return has_texts(source)
        return holds_captions(tar_files(source)[0])
    return False


def _has_tars(folder: str) -> bool:
    return any(map(is_tar, storage.list_files(folder)))


def run_captions(args: argparse.Namespace) -> int:
    """Index the source and print what was taken and what was left out."""
    accept = sample_filter(args)
    is_conversations = str(args.source).endswith(CONVERSATION_FILES)
    if args.images is not None and not is_conversations:
        raise UserError(
            f"--images is for a .jsonl file, not for {args.source}: tars contain their images"
        )
    if args.sidecar is not None and is_conversations:
        raise UserError("--sidecar is for tars: write its texts to the lines of the .jsonl file")
    out = args.out
    if out is None and is_conversations:
        raise UserError("--out is not set: name the folder of the index")
    unit = "line" if is_conversations else "B"
    with progress_bar(desc="indexing", unit=unit, unit_scale=not is_conversations) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if is_conversations:
            found = index_conversations(
                args.source, out, images=args.images, accept=accept, progress=progress
            )
        else:
            out = out or storage.split(tar_files(args.source)[0])[0]
            found = index_captioned(
                args.source,
                out,
                accept=accept,
                sidecar=args.sidecar,
                workers=args.workers,
                progress=progress,
            )
    print(f"{out}: {describe_taken(found.samples, len(found.index))}")
    print(f"left out: {describe_dropped(found.dropped, found.first_dropped)}")
    return 0


def describe_taken(samples: int, images: int) -> str:
    """Return ``5 images with captions``, or ``7 samples with 5 images``."""
    if samples == images:
        return f"{images:,} images with captions"
    return f"{samples:,} samples with {images:,} images"
