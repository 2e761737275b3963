"""``rae-xla checkpoints``: what a run has saved; check it, take it out, make room."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla.cli.options import check_out_file
from rae_xla.data import storage
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import (
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    find_checkpoints,
    newest_checkpoint,
    read_manifest,
    remove,
    rests,
    superfluous,
    verify,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the sub-commands and their options."""
    commands = parser.add_subparsers(dest="checkpoints_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="step, size, date and origin of each")
    check = commands.add_parser("verify", help="compare every byte with its checksum")
    export = commands.add_parser("export", help="write one as a .pt file of the published layout")
    prune = commands.add_parser("prune", help="delete old ones, and what broken-off saves left")
    for command in (listing, check, export, prune):
        command.add_argument(
            "run",
            metavar="RUN",
            help="results folder, folder of checkpoints, or one checkpoint; local or gs://",
        )
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help=".pt to write")
    export.add_argument("--step", type=int, metavar="N", help="which one (default: the newest)")
    export.add_argument(
        "--weights-only",
        action="store_true",
        help="model and ema, without the optimizer: a quarter to a half of the size",
    )
    prune.add_argument(
        "--keep-last", required=True, type=int, metavar="N", help="keep the newest N"
    )
    prune.add_argument("--keep-every", type=int, metavar="N", help="and those of every N steps")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def run(args: argparse.Namespace) -> int:
    """Do what the sub-command says."""
    commands = {"list": _list, "verify": _verify, "export": _export, "prune": _prune}
    return commands[args.checkpoints_command](args)


def _list(args: argparse.Namespace) -> int:
    for checkpoint in _some(args.run):
        try:
            manifest = read_manifest(checkpoint)
        except BrokenCheckpointError as error:
            print(error)
            continue
        size = sum(file["size"] for file in manifest["files"].values())
        origin = manifest["written_by"]
        processes = f"{origin['processes']} process{'es' * (origin['processes'] > 1)}"
        print(
            f"{checkpoint}  {size / 1e6:,.1f} MB  {manifest['written_at']}  "
            f"{origin['backend']}, {origin['mesh']}, {processes}  "
            f"{manifest['code']}"
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    broken = 0
    for checkpoint in _some(args.run):
        try:
            manifest = read_manifest(checkpoint)
            verify(checkpoint, manifest)
            print(f"{checkpoint}: whole, {len(manifest['files'])} files")
        except BrokenCheckpointError as error:
            broken += 1
            print(error)
    return 1 if broken else 0


def _export(args: argparse.Namespace) -> int:
    check_out_file(args.out)
    checkpoint = newest_checkpoint(args.run)
    if args.step is not None:
        steps = {found.step: found for found in find_checkpoints(args.run)}
        if args.step not in steps:
            there = ", ".join(map(str, steps))
            raise UserError(f"{args.run} has no checkpoint of step {args.step}; there are {there}")
        checkpoint = steps[args.step]

    from rae_xla.interop.checkpoint_tensors import CheckpointContent
    from rae_xla.models.weights import write_torch_file

    content = CheckpointContent(checkpoint)
    left_out = {"optimizer", "disc", "disc_optimizer"} if args.weights_only else set()
    chosen = {key: content[key] for key in content if key not in left_out}
    write_torch_file(chosen, args.out)
    print(f"{args.out}: {', '.join(chosen)} of {checkpoint}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    if args.keep_last < 1:
        raise UserError("--keep-last must be at least 1")
    if args.keep_every is not None and args.keep_every < 1:
        raise UserError("--keep-every must be at least 1")
    found = _some(args.run)
    folder = storage.split(found[0].path)[0]
    whole = _newest_whole(found)
    steps = superfluous([checkpoint.step for checkpoint in found], args.keep_last, args.keep_every)
    paths = [checkpoint_path(folder, step) for step in steps if step != whole.step]
    needless = [*paths, *rests(folder)]
    if not needless:
        print(f"{folder}: nothing to delete")
    for path in needless:
        if not args.dry_run:
            remove(path)
        print(f"{path}: {'would be ' if args.dry_run else ''}deleted")
    return 0


def _newest_whole(found: list[Checkpoint]) -> Checkpoint:
    """The checkpoint a run would go on from, which is never deleted."""
    for checkpoint in reversed(found):
        try:
            verify(checkpoint, read_manifest(checkpoint))
        except BrokenCheckpointError as error:
            print(error)
            continue
        return checkpoint
    raise UserError("none of the checkpoints is whole: nothing was deleted")


def _some(run: str) -> list[Checkpoint]:
    """All checkpoints of a run; that there is none is an error."""
    newest_checkpoint(run)
    return find_checkpoints(run)
