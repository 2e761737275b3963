"""``python -m rae_xla.tools.first_run OUT``: a first run on new hardware, into one file."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import torch

from rae_xla.config.paths import LOCAL, parse_path
from rae_xla.config.ranges import LONGEST_WAIT, Range
from rae_xla.errors import UserError
from rae_xla.progress import configure_logging
from rae_xla.tools.first_run.runner import run_all
from rae_xla.tools.first_run.settings import FirstRun

logger = logging.getLogger("rae_xla.tools.first_run")

_MINUTES = Range(above=0, most=LONGEST_WAIT)


def main() -> int:
    """Run all sections; return 1 unless all of them passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the file to write, JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--minutes", type=float, default=10.0, help="limit; default: 10")
    args = parser.parse_args()
    try:
        out = Path(parse_path(args.out, "OUT", LOCAL))
    except UserError as error:
        parser.error(str(error))
    if not _MINUTES.contains(args.minutes):
        parser.error(f"--minutes {args.minutes}: expected {_MINUTES.describe(args.minutes)}")
    configure_logging()
    devices = 1 if args.smoke else max(1, torch.accelerator.device_count())
    with tempfile.TemporaryDirectory(prefix="rae-xla-first-run-") as folder:
        run = FirstRun(folder, args.smoke, devices, 60 * args.minutes)
        sections = run_all(run, out)
    logger.info("written: %s", out)
    return 0 if all(section.status == "passed" for section in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
