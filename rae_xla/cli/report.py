"""``rae-xla report``: write an HTML page about one or several runs."""

from __future__ import annotations

import argparse

from rae_xla.cli.options import PathAction, check_out_file
from rae_xla.config.paths import StoragePath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folders",
        action=PathAction,
        nargs="+",
        metavar="RESULTS_DIR",
        help="results folder of a run, local or gs://",
    )
    parser.add_argument(
        "--out",
        action=PathAction,
        metavar="FILE",
        help="HTML file to write, local or gs://; default: report.html in the results folder, for "
        "several runs in the current folder",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; print its path and warnings about the results folders."""
    from rae_xla.tools.report.page import write_page
    from rae_xla.tools.report.runs import read_runs

    runs = read_runs(args.folders)
    out = args.out or (args.folders[0] if len(runs) == 1 else StoragePath("")) / "report.html"
    check_out_file(out, inputs=args.folders)
    write_page(runs, out)
    for run in runs:
        for warning in run.warnings:
            print(f"{run.folder}: {warning}")
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0
