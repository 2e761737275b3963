"""``rae-xla VERB ...``: parse the arguments, run the verb, report errors."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType

import rae_xla
from rae_xla.errors import UserError, exit_status
from rae_xla.version import __version__

# A verb's module is imported only when the verb runs: `rae-xla --help` must not wait for torch.
# It offers `add_arguments(parser)` and `run(args) -> int`, the exit status.
VERBS = {
    "shards": "write a data set as shards, or verify shards",
    "plan": "predict memory, time and cost of a run, without TPUs or GPUs",
    "doctor": "check everything a run needs: devices, storage, data, hosts",
    "train": "train an autoencoder (stage1) or a diffusion transformer (stage2)",
    "report": "write an HTML page with curves, samples and settings of one or more runs",
    "stats": "compute mean and variance of the latents of a data set",
    "generate": "generate images of classes or prompts; downloads the published models",
    "ask": "ask a text-to-image model about an image or a generated latent",
    "serve": "offer a page in the browser that generates images",
    "sample": "generate a set of images of classes or of a file of prompts",
    "reconstruct": "encode images and decode them again with an autoencoder",
    "evaluate": "measure generated images or reconstructions, or compare decoders",
    "checkpoints": "list, verify, export or prune the checkpoints of a run",
    "convert": "convert weights between layouts: published, diffusers, safetensors, ours",
    "export": "deprecated: use checkpoints export --what decoder",
    "hub": "download published models, or upload a model to the Hugging Face hub",
}

_TORCHRUN_DELAY = 5.0
"""Seconds that other processes wait before they report an error that process 0 may have, too.

torchrun polls its processes every 0.1 s and ends all of them as soon as one has failed, so an error
that all processes share is reported once.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    2 means an error that the user can correct, 77 a lost connection (see ``errors.exit_status``).
    """
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        _print_error(str(error))
        return exit_status(error)
    except BrokenPipeError:
        # The reader (`| head`) closed the pipe. Python's own flush at exit must not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A full disk, a missing permission or a lost connection is not a bug.
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{where}{error.strerror or error}")
        return exit_status(error)
    except KeyboardInterrupt:
        print("rae-xla: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


def _print_error(message: str) -> None:
    """Print an error to stderr; under torchrun after process 0 had time to print the same one."""
    text = f"error: {message}"
    if (rank := os.environ.get("RANK", "0")) != "0":
        time.sleep(_TORCHRUN_DELAY)
        text = f"process {rank}: {text}"
    print(f"rae-xla: {text}", file=sys.stderr)


def run(argv: Sequence[str]) -> int:
    """Parse ``argv``, run its verb and return the exit status; errors propagate."""
    parser = main_parser()
    verb = parser.parse_args(argv[:1]).verb
    if verb is None:
        parser.print_help()
        return 2
    args = parse_verb(verb, argv[1:])

    from rae_xla.progress import configure_logging, reset_logging

    configure_logging()
    try:
        return int(verb_module(verb).run(args))
    finally:
        # Only a verb that works with a backend has imported the module, and torch.
        if process_group := sys.modules.get("rae_xla.runtime.process_group"):
            process_group.leave()
        reset_logging()


def main_parser() -> argparse.ArgumentParser:
    """Return the parser of the verb's name and of the options that precede it."""
    width = max(map(len, VERBS)) + 2
    parser = argparse.ArgumentParser(
        prog="rae-xla",
        usage="rae-xla VERB ...",
        description=rae_xla.__doc__,
        epilog="verbs:\n"
        + "".join(f"  {verb:<{width}}{about}\n" for verb, about in VERBS.items())
        + "\n`rae-xla VERB --help` describes a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("verb", nargs="?", metavar="VERB", help=argparse.SUPPRESS)
    return parser


def parse_verb(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a verb; ``key=value`` settings may precede or follow the options."""
    module = verb_module(verb)
    parser = argparse.ArgumentParser(prog=f"rae-xla {verb}", description=VERBS[verb])
    module.add_arguments(parser)
    try:
        args = parser.parse_intermixed_args(argv)
    except TypeError:  # argparse cannot intermix where there are subcommands, as in shards
        args = parser.parse_args(argv)
    return args


def verb_module(verb: str) -> ModuleType:
    """Import the module of a verb; raise ``UserError`` if the verb does not exist."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"unknown verb '{verb}': {hint} (rae-xla --help)")
    return importlib.import_module(f"rae_xla.cli.{verb}")
