"""``rae-xla shards``: make, index and verify shards, and show statistics."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from rae_xla import storage
from rae_xla.cli.captions import (
    add_captions,
    add_filter_options,
    add_index_options,
    add_workers,
    run_captions,
    sample_filter,
    wants_captions,
)
from rae_xla.cli.options import NumberAction, PathAction, check_out_file
from rae_xla.config.paths import LOCAL, PathRule
from rae_xla.config.ranges import COUNT, COUNT_OR_ZERO, Range
from rae_xla.data.class_names import read_class_names
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.index import ShardIndex, open_index, read_index
from rae_xla.data.shards.indexing import index_shards
from rae_xla.data.shards.journal import check_target
from rae_xla.data.shards.sample_filter import describe_dropped
from rae_xla.data.shards.sources import ImageSource, open_captioned_source, open_image_source
from rae_xla.data.shards.stats import (
    DEFAULT_EXAMINED,
    format_stats,
    save_stats_plot,
    shard_stats,
)
from rae_xla.data.shards.verify import verify
from rae_xla.data.shards.writer import SHARD_BYTES, make_shards
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar

logger = logging.getLogger(__name__)

LARGEST_SHARD = 10**12
"""Bytes."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="shards_command", metavar="COMMAND", required=True)
    _add_make(commands.add_parser("make", help="write shards from images, tars, parquet or arrays"))

    index = commands.add_parser("index", help="write an index of existing WebDataset tars")
    index.add_argument(
        "source",
        action=PathAction,
        metavar="SHARDS",
        help="a folder of .tar files, one .tar file, a pattern such as x-{0000..1023}.tar, or a "
        ".jsonl file of conversations; local or gs://",
    )
    index.add_argument(
        "--out",
        action=PathAction,
        metavar="FOLDER",
        help="folder of the index (default: that of the tars)",
    )
    _add_classes(index)
    add_workers(index, "number of processes that read")
    _add_kind(index)
    add_index_options(index)
    add_filter_options(index)

    add_captions(commands.add_parser("captions", help="the same as index --captions"))

    check = commands.add_parser("verify", help="read every byte of shards and report every fault")
    check.add_argument(
        "out", action=PathAction, metavar="SHARDS", help="the folder of shards or its index.json"
    )
    add_workers(check, "number of processes that read")

    stats = commands.add_parser("stats", help="count classes, sizes, formats and resolutions")
    stats.add_argument(
        "shards", action=PathAction, metavar="SHARDS", help="the folder of shards or its index.json"
    )
    stats.add_argument(
        "--out", action=PathAction, metavar="PLOT", help="write histograms to this .png file"
    )
    stats.add_argument(
        "--sample",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        default=DEFAULT_EXAMINED,
        metavar="N",
        help=f"number of images whose headers are read (default: {DEFAULT_EXAMINED:,})",
    )


def _add_make(make: argparse.ArgumentParser) -> None:
    make.add_argument(
        "source",
        action=PathAction,
        rule=PathRule(hub=True),
        metavar="SOURCE",
        help="a folder with a sub-folder of images per class; WebDataset tars (a folder, a file or "
        "a pattern such as x-{0000..1023}.tar); hf:OWNER/NAME; a .parquet file or a folder of "
        "them; an .npz file with arrays 'images' (uint8, N x H x W [x 3]) and 'labels'; or an "
        ".npy file of images (with --labels)",
    )
    make.add_argument(
        "out", action=PathAction, metavar="OUT", help="a new or empty folder, local or gs://"
    )
    _add_classes(make)
    make.add_argument(
        "--labels",
        action=PathAction,
        rule=LOCAL,
        metavar="FILE",
        help=".npy file of labels for an .npy file of images",
    )
    make.add_argument(
        "--split", default="train", help="split of a Hugging Face data set (default: train)"
    )
    make.add_argument(
        "--image-column", metavar="NAME", help="column of images of a Hugging Face data set"
    )
    make.add_argument(
        "--label-column", metavar="NAME", help="column of labels of a Hugging Face data set"
    )
    make.add_argument(
        "--image-size",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="resize larger images to N pixels on the shorter side (default: keep the files)",
    )
    make.add_argument(
        "--resize",
        choices=("adm", "bicubic"),
        help="adm (default): halve with a box filter, then bicubic; keeps ADM's centre crops; "
        "bicubic: one bicubic step",
    )
    make.add_argument(
        "--quality",
        action=NumberAction,
        accepted=Range(least=1, most=100),
        type=int,
        metavar="Q",
        help="encode resized images as JPEG of this quality, 1 to 100 (default: PNG, lossless)",
    )
    make.add_argument(
        "--upright",
        action="store_true",
        help="rotate images as their EXIF data say, and encode them again (default: keep them as "
        "they are stored, as the published code does)",
    )
    make.add_argument(
        "--shard-size",
        type=parse_bytes,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="maximum size of a shard, such as 256MB (default) or 1GiB",
    )
    make.add_argument(
        "--samples-per-shard",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="maximum number of samples per shard",
    )
    add_workers(make, "number of processes that encode")
    _add_kind(make)
    make.add_argument(
        "--caption-columns",
        metavar="NAME[,NAME...]",
        help="columns of texts of a data set with --captions (default: all but the image)",
    )
    add_filter_options(make)
    make.add_argument(
        "--keep-order",
        action="store_true",
        help="keep the order of the source (default: shuffle, so that shards have all classes)",
    )


def _add_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        action=PathAction,
        metavar="FILE",
        help='names and labels of classes: a JSON object {"name": label}, a JSON array, or '
        "lines of 'name label' or, in order, just 'name'",
    )


def _add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--captions",
        action=argparse.BooleanOptionalAction,
        help="read images with captions or conversations rather than with labels (default: for "
        "tars without .cls members, and for .jsonl files)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the sub-command; the exit status is 1 if ``verify`` found a fault."""
    command = {
        "make": _make,
        "index": _index,
        "captions": run_captions,
        "verify": _verify,
        "stats": _stats,
    }
    return command[args.shards_command](args)


def parse_bytes(text: str) -> int:
    """Parse a size: ``"256MB"`` -> 256000000; KB, MB, GB are powers of 1000, KiB, … of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MB or 1GiB")
    size = float(match[1]) * UNITS[match[2].upper()]
    if not 1 <= size <= LARGEST_SHARD:
        raise argparse.ArgumentTypeError(f"{text!r}: a shard has from 1 byte to 1 TB")
    return int(size)


def _make(args: argparse.Namespace) -> int:
    if args.resize and args.image_size is None:
        raise UserError(f"--resize {args.resize} has no effect without --image-size")
    if storage.is_within(args.out, args.source):
        raise UserError(f"OUT {args.out} is in SOURCE {args.source}: give a folder outside of it")
    check_target(args.out)  # before a large source is read in vain
    encoding = Encoding(args.image_size, args.resize or "adm", args.quality, args.upright)
    if wants_captions(args):
        return _make_captioned(args, encoding)
    return _write(
        args,
        open_image_source(
            args.source,
            encoding=encoding,
            class_names=_class_names(args),
            labels=args.labels,
            split=args.split,
            image_column=args.image_column,
            label_column=args.label_column,
            shuffle=not args.keep_order,
            workers=args.workers,
        ),
    )


def _make_captioned(args: argparse.Namespace, encoding: Encoding) -> int:
    if args.classes or args.labels or args.label_column:
        raise UserError("--classes, --labels and --label-column are not for images with captions")
    columns = args.caption_columns.split(",") if args.caption_columns else None
    source, dropped = open_captioned_source(
        args.source,
        encoding=encoding,
        accept=sample_filter(args),
        split=args.split,
        image_column=args.image_column,
        caption_columns=columns,
        shuffle=not args.keep_order,
        workers=args.workers,
    )
    status = _write(args, source)
    print(f"left out: {describe_dropped(dropped, source.first_dropped)}")
    return status


def _write(args: argparse.Namespace, source: ImageSource) -> int:
    # The bar must end before an error is printed.
    with ExitStack() as stack:

        def with_progress(samples: Iterator[ShardSample], done: int) -> Iterable[ShardSample]:
            if done:
                logger.info("%s: resuming after %s images", args.out, f"{done:,}")
            bar = progress_bar(
                samples, initial=done, total=len(source), desc="writing shards", unit="image"
            )
            return stack.enter_context(bar)

        index = make_shards(
            source,
            args.out,
            shard_size_bytes=args.shard_size,
            samples_per_shard=args.samples_per_shard,
            progress=with_progress,
        )
    print(f"{index.folder}: {_counts(index)}")
    return 0


def _index(args: argparse.Namespace) -> int:
    if wants_captions(args):
        if args.classes:
            raise UserError("--classes is for images with labels: leave it out with --captions")
        return run_captions(args)
    with progress_bar(desc="indexing", unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = index_shards(
            args.source,
            args.out,
            class_names=_class_names(args),
            workers=args.workers,
            progress=progress,
        )
    print(f"{args.out or index.folder}: {_counts(index)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    index = read_index(args.out)
    with progress_bar(total=len(index), desc="verifying", unit="image") as bar:
        faults = verify(args.out, progress=bar.update, workers=args.workers)
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        print(f"{index.folder}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
        return 1
    print(f"{index.folder}: ok, {_counts(index)}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    check_out_file(args.out)
    stats = shard_stats(open_index(args.shards), args.sample)
    print(format_stats(stats))
    if args.out:
        save_stats_plot(stats, args.out)
        print(f"plot: {args.out}")
    return 0


def _class_names(args: argparse.Namespace) -> tuple[str, ...] | None:
    return read_class_names(args.classes) if args.classes else None


def _counts(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards) / 1e6
    return (
        f"{len(index):,} images of {index.num_classes:,} classes in {len(index.shards):,} "
        f"shard{'s' if len(index.shards) > 1 else ''} ({size:,.1f} MB)"
    )
