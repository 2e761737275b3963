"""``rae-xla VERB ...``: find the verb, read its arguments, run it, say what went wrong."""

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
from rae_xla.errors import UserError

# A verb's module is imported when the verb is used: `rae-xla --help` needs no torch.
# It has `add_arguments(parser)` and `run(args) -> int`, the exit status.
VERBS = {
    "shards": "write a data set as shards, or verify shards",
    "plan": "what a run will cost on a TPU, before one is rented",
    "doctor": "try out all that a run needs: devices, storage, data, hosts",
    "train": "train an autoencoder (stage1) or a diffusion transformer (stage2)",
    "report": "one page of curves, samples and settings of one or several runs",
    "stats": "mean and variance of a data set's latents",
    "generate": "draw pictures of named classes; downloads the published models",
    "sample": "draw images from a trained diffusion transformer",
    "reconstruct": "send images through an autoencoder and back",
    "evaluate": "measure generated images or reconstructions, compare decoders",
    "checkpoints": "list, verify, export or prune what a run has saved",
    "convert": "weights from one layout to another: published, diffusers, safetensors, ours",
    "export": "write a trained model as files of the published layout",
    "hub": "published models here, our own there",
}

_FIRST_SPEAKS = 5.0  # seconds; torchrun looks for failed processes ten times in each


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status (2: the user can put it right)."""
    try:
        status = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Keep Python's own last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # a full disk, a folder that may not be written: the user's to mend, and no bug
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        print("rae-xla: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


def _say(text: str) -> None:
    """Print an error; of several processes with the same one, torchrun's first says it.

    torchrun ends all others as soon as one has failed, before they have waited long enough.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_FIRST_SPEAKS)
        text = f"process {os.environ['RANK']}: {text}"
    print(f"rae-xla: {text}", file=sys.stderr)


def run(argv: Sequence[str]) -> int:
    """Parse ``argv`` and run its verb; errors are the caller's."""
    parser = main_parser()
    verb = parser.parse_args(argv[:1]).verb
    if verb is None:
        parser.print_help()
        return 2
    return verb_module(verb).run(parse_verb(verb, argv[1:]))


def main_parser() -> argparse.ArgumentParser:
    """The parser of what stands before the verb's own arguments."""
    width = max(map(len, VERBS)) + 2
    parser = argparse.ArgumentParser(
        prog="rae-xla",
        usage="rae-xla VERB ...",
        description=rae_xla.__doc__,
        epilog="verbs:\n"
        + "".join(f"  {verb:<{width}}{about}\n" for verb, about in VERBS.items())
        + "\n`rae-xla VERB --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=rae_xla.__version__)
    parser.add_argument("verb", nargs="?", metavar="VERB", help=argparse.SUPPRESS)
    return parser


def parse_verb(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """Read a verb's own arguments, with ``key=value`` settings before or after the options."""
    module = verb_module(verb)
    parser = argparse.ArgumentParser(prog=f"rae-xla {verb}", description=VERBS[verb])
    module.add_arguments(parser)
    try:
        return parser.parse_intermixed_args(argv)
    except TypeError:  # argparse cannot intermix what has commands of its own, as shards has
        return parser.parse_args(argv)


def verb_module(verb: str) -> ModuleType:
    """The module of a verb; raises ``UserError`` if there is no such verb."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(VERBS)}"
        raise UserError(f"unknown verb '{verb}': {hint} (rae-xla --help)")
    return importlib.import_module(f"rae_xla.cli.{verb}")
