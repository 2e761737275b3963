"""``rae-xla checkpoints``: list, verify, export, average or prune the checkpoints of a run."""

from __future__ import annotations

import argparse

from rae_xla import storage
from rae_xla.checkpoint.manager import (
    AVERAGE_PREFIX,
    AVERAGES_FILE,
    MANIFEST_FILE,
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    find_checkpoints,
    incomplete_checkpoints,
    newest_checkpoint,
    prunable_steps,
    read_checkpoint_manifest,
    unlisted_files,
    verify,
)
from rae_xla.checkpoint.posthoc_ema import has_averages, list_reduced, retire
from rae_xla.cli.options import NumberAction, PathAction, check_new_folder, check_out_file
from rae_xla.config.ranges import AVERAGE_WIDTH, COUNT, COUNT_OR_ZERO
from rae_xla.errors import UserError
from rae_xla.storage.staging import staged_output

OPTIMIZER_PARTS = {"optimizer", "disc", "disc_optimizer"}
"""Parts that only resuming needs."""

LARGEST_ERROR = 0.05
"""Error of a profile above which a warning is printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands and their options."""
    commands = parser.add_subparsers(dest="checkpoints_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="print step, size, date and origin of each")
    check = commands.add_parser("verify", help="compare every file with its checksum")
    export = commands.add_parser("export", help="write one, or its decoder, as a .pt file")
    averaging = commands.add_parser(
        "ema", help="write the moving average of any width, combined from tracked ones"
    )
    prune = commands.add_parser("prune", help="delete old checkpoints and incomplete ones")
    for command in (listing, check, export, averaging, prune):
        command.add_argument(
            "run",
            action=PathAction,
            metavar="RUN",
            help="results folder, folder of checkpoints, or one checkpoint; local or gs://",
        )
    export.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="FILE",
        help=".pt file to write, local or gs://; with --what text-to-image a new folder",
    )
    export.add_argument(
        "--step",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        metavar="N",
        help="which one (default: the newest)",
    )
    export.add_argument(
        "--what",
        choices=("all", "weights", "decoder", "text-to-image"),
        default="all",
        help="all: the complete checkpoint in the published layout (default); weights: model and "
        "ema without the optimizer, a quarter to a half of the size; decoder: the decoder of "
        "stage 1 for pretrained_decoder_path, RUN may also be a file of weights; text-to-image: a "
        "folder in the layout of Scale-RAE, with the averaged weights",
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
    averaging.add_argument(
        "--width",
        action=NumberAction,
        accepted=AVERAGE_WIDTH,
        type=float,
        required=True,
        metavar="W",
        help="standard deviation of the averaging profile, relative to the steps so far, such as "
        "0.07; the run must have tracked training.posthoc_ema.widths",
    )
    averaging.add_argument(
        "--out",
        action=PathAction,
        required=True,
        metavar="FILE",
        help=".pt file to write, local or gs://; commands that take a checkpoint take it",
    )
    averaging.add_argument(
        "--step",
        action=NumberAction,
        accepted=COUNT_OR_ZERO,
        type=int,
        metavar="N",
        help="after which step (default: that of the newest)",
    )
    prune.add_argument(
        "--keep-last",
        required=True,
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="keep the newest N",
    )
    prune.add_argument(
        "--keep-every",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="and those of every N steps",
    )
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    commands = {
        "list": _list,
        "verify": _verify,
        "export": _export,
        "ema": _average,
        "prune": _prune,
    }
    return commands[args.checkpoints_command](args)


def export_decoder_file(run: str, out: str, weights: str, option: str = "RUN") -> None:
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
    with staged_output(out) as file:
        count = export_decoder(source, file, weights)
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
    for reduced in _find_reduced(args.run):
        print(f"{reduced}  reduced to its averages, for `rae-xla checkpoints ema`")
    return 0


def _verify(args: argparse.Namespace) -> int:
    broken = 0
    named = [(checkpoint, MANIFEST_FILE) for checkpoint in _find_some(args.run)]
    named += [(checkpoint, AVERAGES_FILE) for checkpoint in _find_reduced(args.run)]
    for checkpoint, name in named:
        try:
            manifest = read_checkpoint_manifest(checkpoint, name)
            verify(checkpoint, manifest)
            others = unlisted_files(checkpoint, manifest)
            more = f"; not listed, so not verified: {', '.join(others)}" if others else ""
            print(f"{checkpoint}: intact, {len(manifest['files'])} files{more}")
        except BrokenCheckpointError as error:
            broken += 1
            print(error)
    return 1 if broken else 0


def _export(args: argparse.Namespace) -> int:
    if args.weights and args.what != "decoder":
        raise UserError("--weights selects the decoder's weights: use it with --what decoder")
    if args.what == "text-to-image":
        return _export_text_to_image(args)
    check_out_file(args.out, inputs=[args.run])
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
    chosen = {
        key: content[key]
        for key in content
        if args.what != "weights" or not (key in OPTIMIZER_PARTS or key.startswith(AVERAGE_PREFIX))
    }
    with staged_output(args.out) as out:
        write_torch_file(chosen, out)
    print(f"{args.out}: {', '.join(chosen)} of {checkpoint}")
    return 0


def _export_text_to_image(args: argparse.Namespace) -> int:
    from rae_xla.interop.text_to_image import export_text_to_image

    check_new_folder(args.out)
    source = args.run if args.step is None else str(_find_step(args.run, args.step))
    with staged_output(args.out) as out:
        export_text_to_image(source, str(out))
    print(f"{args.out}: the text-to-image model of {source}")
    return 0


def _average(args: argparse.Namespace) -> int:
    check_out_file(args.out, inputs=[args.run])
    if args.step is None:
        checkpoint = newest_checkpoint(args.run)
    else:
        checkpoint = _find_step(args.run, args.step)

    from rae_xla.checkpoint.posthoc_ema import reconstruct
    from rae_xla.checkpoint.provenance import PROVENANCE_KEY
    from rae_xla.models.pretrained.manifest import parse_manifest, write_weights_manifest
    from rae_xla.models.weights import write_torch_file

    average = reconstruct(checkpoint, args.width)
    content = {
        "ema": average.state,
        "step": average.step,
        "config": average.manifest["config"],
        "posthoc_ema": {"width": args.width, "steps": average.sources, "error": average.error},
    }
    recorded = average.manifest.get(PROVENANCE_KEY)
    with staged_output(args.out) as out:
        write_torch_file(content, out)
        if recorded is not None:
            write_weights_manifest(out, parse_manifest(recorded, checkpoint.path))
    print(
        f"{args.out}: average of width {args.width:g} after step {average.step}, from the averages "
        f"of {len(average.sources)} steps; its profile is {average.error:.2%} off"
    )
    if average.error > LARGEST_ERROR:
        print(
            "warning: the tracked averages cannot represent this width well: choose one closer to "
            "training.posthoc_ema.widths, or store more of them (checkpoint.every_steps, "
            "training.posthoc_ema.keep)"
        )
    return 0


def _prune(args: argparse.Namespace) -> int:
    found = _find_some(args.run)
    folder = storage.split(found[0].path)[0]
    intact = _newest_intact(found)
    steps = prunable_steps([c.step for c in found], args.keep_last, args.keep_every)
    paths = [checkpoint_path(folder, step) for step in steps if step != intact.step]
    paths += incomplete_checkpoints(folder)
    if not paths:
        print(f"{folder}: nothing to delete")
    for path in paths:
        reduced = has_averages(path) if args.dry_run else retire(path)
        done = "reduced to its averages" if reduced else "deleted"
        print(f"{path}: {'would be ' if args.dry_run else ''}{done}")
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


def _find_reduced(run: str) -> list[Checkpoint]:
    """Return the reduced checkpoints of a run; none if ``run`` is a single checkpoint."""
    newest = newest_checkpoint(run).path
    return [] if newest == run.rstrip("/") else list_reduced(storage.split(newest)[0])


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
