"""``rae-xla report``: write an HTML page about one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rae_xla.cli.options import check_out_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RESULTS_DIR", help="results folder of a run"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="HTML file to write; default: report.html in the results folder, for several runs in "
        "the current folder",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; print its path and warnings about the results folders."""
    from rae_xla.tools.report.page import write_page
    from rae_xla.tools.report.runs import read_runs

    runs = read_runs(args.folders)
    out = args.out or (args.folders[0] if len(runs) == 1 else Path()) / "report.html"
    check_out_file(out)
    write_page(runs, out)
    for run in runs:
        for warning in run.warnings:
            print(f"{run.folder}: {warning}")
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0
