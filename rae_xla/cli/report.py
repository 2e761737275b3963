"""``rae-xla report``: how runs went, as one page."""

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
        help="page to write; default: report.html in the folder, of several runs in this one",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from rae_xla.report.page import write_page
    from rae_xla.report.runs import read_runs

    runs = read_runs(args.folders)
    out = args.out or (args.folders[0] if len(runs) == 1 else Path()) / "report.html"
    check_out_file(out)
    write_page(runs, out)
    for found in runs:
        for remark in found.remarks:
            print(f"{found.folder}: {remark}")
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0
