"""``rae-xla shards make`` and ``rae-xla shards verify``."""

from __future__ import annotations

import argparse
import re

from tqdm import tqdm

from rae_xla.data.index import ShardIndex, read_index
from rae_xla.data.shards import SHARD_BYTES, verify, write_shards
from rae_xla.data.sources import open_source

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two sub-commands and their options."""
    commands = parser.add_subparsers(dest="shards_command", metavar="COMMAND", required=True)

    make = commands.add_parser("make", help="write shards from a folder of images or from arrays")
    make.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with a sub-folder of images per class; an .npz file with arrays 'images' "
        "(uint8, N x H x W [x 3]) and 'labels'; or an .npy file of images (then give --labels)",
    )
    make.add_argument("out", metavar="OUT", help="a new or empty folder, local or gs://")
    make.add_argument("--labels", metavar="FILE", help="labels (.npy) of an .npy file of images")
    make.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="shorten the shorter side of larger images to N pixels (default: keep the files)",
    )
    make.add_argument(
        "--shard-size",
        type=parse_bytes,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="bytes of a shard at most, such as 256MB (the default) or 1GiB",
    )
    make.add_argument(
        "--samples-per-shard", type=int, metavar="N", help="samples of a shard at most"
    )
    make.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that encode (default: 1)"
    )
    make.add_argument(
        "--keep-order",
        action="store_true",
        help="keep the order of the source (default: mix it, so that shards hold all classes)",
    )

    check = commands.add_parser("verify", help="read every byte of a folder of shards")
    check.add_argument("out", metavar="OUT", help="the folder of shards or its index.json")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status is 1 if ``verify`` found a fault."""
    return _make(args) if args.shards_command == "make" else _verify(args)


def parse_bytes(text: str) -> int:
    """``"256MB"`` -> 256000000; units KB, MB, GB (powers of 1000), KiB, MiB, GiB (of 1024)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MB or 1GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _make(args: argparse.Namespace) -> int:
    source = open_source(
        args.source,
        labels=args.labels,
        image_size=args.image_size,
        shuffle=not args.keep_order,
        workers=args.workers,
    )
    with tqdm(source, desc="writing shards", unit="image") as samples:
        index = write_shards(
            samples,
            args.out,
            classes=source.classes,
            shard_size_bytes=args.shard_size,
            samples_per_shard=args.samples_per_shard,
        )
    print(f"{index.folder}: {_counts(index)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    index = read_index(args.out)
    with tqdm(total=len(index), desc="verifying", unit="image") as bar:
        faults = verify(args.out, progress=bar.update)
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        print(f"{index.folder}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
        return 1
    print(f"{index.folder}: ok, {_counts(index)}")
    return 0


def _counts(index: ShardIndex) -> str:
    size = sum(shard.bytes for shard in index.shards) / 1e6
    return (
        f"{len(index):,} images of {index.num_classes:,} classes in {len(index.shards):,} "
        f"shard{'s' if len(index.shards) > 1 else ''} ({size:,.1f} MB)"
    )
