"""``rae-xla checkpoints``: list, verify, export or prune the checkpoints of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla import storage
from rae_xla.checkpoint.manager import (
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    delete_checkpoint,
    find_checkpoints,
    incomplete_checkpoints,
    newest_checkpoint,
    prunable_steps,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.cli.options import check_out_file
from rae_xla.errors import UserError

OPTIMIZER_PARTS = {"optimizer", "disc", "disc_optimizer"}
"""Parts that only resuming needs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    commands = parser.add_subparsers(dest="checkpoints_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="print step, size, date and origin of each")
    check = commands.add_parser("verify", help="compare every file with its checksum")
    export = commands.add_parser("export", help="write one, or its decoder, as a .pt file")
    prune = commands.add_parser("prune", help="delete old checkpoints and incomplete ones")
    for command in (listing, check, export, prune):
        command.add_argument(
            "run",
            metavar="RUN",
            help="results folder, folder of checkpoints, or one checkpoint; local or gs://",
        )
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help=".pt file to write")
    export.add_argument("--step", type=int, metavar="N", help="which one (default: the newest)")
    export.add_argument(
        "--what",
        choices=("all", "weights", "decoder"),
        default="all",
        help="all: the complete checkpoint in the published layout (default); weights: model and "
        "ema without the optimizer, a quarter to a half of the size; decoder: the decoder of "
        "stage 1 for pretrained_decoder_path, RUN may also be a file of weights",
    )
    export.add_argument(
        "--weights-only",
        action="store_const",
        const="weights",
        dest="what",
        help="the same as --what weights",
    )
    export.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="whose decoder: of the moving average (default) or of the trained model",
    )
    prune.add_argument(
        "--keep-last", required=True, type=int, metavar="N", help="keep the newest N"
    )
    prune.add_argument("--keep-every", type=int, metavar="N", help="and those of every N steps")
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    commands = {"list": _list, "verify": _verify, "export": _export, "prune": _prune}
    return commands[args.checkpoints_command](args)


def export_decoder_file(run: str, out: Path, weights: str, option: str = "RUN") -> None:
    """Write the decoder of a checkpoint or of a file of weights, and print what was written.

    Args:
        run: what ``checkpoint.tensors.find_weights`` accepts.
        out: the file.
        weights: ``ema`` or ``model``.
        option: that gave ``run``, for error messages.
    """
    from rae_xla.checkpoint.tensors import find_weights
    from rae_xla.interop.layouts import export_decoder

    source = find_weights(run, option)
    count = export_decoder(source, out, weights)
    print(f"{out}: decoder of {source} ({weights}), {count:,} parameters")


def _list(args: argparse.Namespace) -> int:
    for checkpoint in _find_some(args.run):
        try:
            manifest = read_checkpoint_manifest(checkpoint)
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
    for checkpoint in _find_some(args.run):
        try:
            manifest = read_checkpoint_manifest(checkpoint)
            verify(checkpoint, manifest)
            print(f"{checkpoint}: intact, {len(manifest['files'])} files")
        except BrokenCheckpointError as error:
            broken += 1
            print(error)
    return 1 if broken else 0


def _export(args: argparse.Namespace) -> int:
    if args.weights and args.what != "decoder":
        raise UserError("--weights selects the decoder's weights: use it with --what decoder")
    check_out_file(args.out)
    if args.what == "decoder":
        source = args.run if args.step is None else str(_find_step(args.run, args.step))
        export_decoder_file(source, args.out, args.weights or "ema")
        return 0
    if args.step is None:
        checkpoint = newest_checkpoint(args.run)
    else:
        checkpoint = _find_step(args.run, args.step)

    from rae_xla.checkpoint.tensors import CheckpointContent
    from rae_xla.models.weights import write_torch_file

    content = CheckpointContent(checkpoint)
    omitted = OPTIMIZER_PARTS if args.what == "weights" else set()
    chosen = {key: content[key] for key in content if key not in omitted}
    write_torch_file(chosen, args.out)
    print(f"{args.out}: {', '.join(chosen)} of {checkpoint}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    if args.keep_last < 1:
        raise UserError("--keep-last must be at least 1")
    if args.keep_every is not None and args.keep_every < 1:
        raise UserError("--keep-every must be at least 1")
    found = _find_some(args.run)
    folder = storage.split(found[0].path)[0]
    intact = _newest_intact(found)
    steps = prunable_steps([c.step for c in found], args.keep_last, args.keep_every)
    paths = [checkpoint_path(folder, step) for step in steps if step != intact.step]
    paths += incomplete_checkpoints(folder)
    if not paths:
        print(f"{folder}: nothing to delete")
    for path in paths:
        if not args.dry_run:
            delete_checkpoint(path)
        print(f"{path}: {'would be ' if args.dry_run else ''}deleted")
    return 0


def _newest_intact(found: list[Checkpoint]) -> Checkpoint:
    """Return the checkpoint that the run would resume from, which is never deleted."""
    for checkpoint in reversed(found):
        try:
            verify(checkpoint, read_checkpoint_manifest(checkpoint))
        except BrokenCheckpointError as error:
            print(error)
            continue
        return checkpoint
    raise UserError(
        "none of the checkpoints is intact, so nothing was deleted: restore the files listed above"
    )


def _find_some(run: str) -> list[Checkpoint]:
    """Return all checkpoints of a run, oldest first; raise ``UserError`` if there is none."""
    newest_checkpoint(run)
    return find_checkpoints(run)


def _find_step(run: str, step: int) -> Checkpoint:
    """Return the checkpoint of a step; raise ``UserError`` if there is none."""
    found = {checkpoint.step: checkpoint for checkpoint in _find_some(run)}
    if step not in found:
        steps = ", ".join(map(str, found))
        raise UserError(f"{run} has no checkpoint of step {step}; its checkpoints: {steps}")
    return found[step]
