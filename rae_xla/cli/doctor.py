"""``rae-xla doctor``: everything a run needs, tried out before it needs it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rae_xla.doctor.finding import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--config", metavar="FILE", help="the run's YAML: its data, mesh, storage")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's, such as data.train=gs://bucket/shards",
    )
    parser.add_argument(
        "--results-dir", type=Path, metavar="DIR", help="where the run is to write its results"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a list")


def run(args: argparse.Namespace) -> int:
    """Examine; 0 where nothing failed, else 1."""
    from rae_xla.config import load_config
    from rae_xla.doctor import devices, files, report, software
    from rae_xla.doctor.finding import Patient, examine

    config = load_config(args.config, overrides=args.overrides)
    patient = Patient(config, named=args.config is not None, results=args.results_dir)
    checks = {
        software.VERSIONS: software.check_versions,
        software.ENVIRONMENT: software.check_environment,
        files.STORAGE: files.check_storage,
        files.DATA: files.check_data,
        software.TRACKING: software.check_tracking,
        devices.DEVICES: devices.check_devices,
        devices.SPEED: devices.check_speed,
        devices.HOSTS: devices.check_clocks,
    }
    findings: list[Finding] = []

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    def begin(section: str) -> None:
        say(f"\n{section}")

    def hear(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            say(report.line(finding))

    hear(examine(patient, checks, begin))
    if patient.runtime is not None and patient.runtime.process_count > 1:
        begin(report.ELSEWHERE)
        hear(report.troubles_elsewhere(patient.runtime, findings))
    if args.json:
        print(report.as_json(findings))
    else:
        print("\nwhat to fix")
        for text in report.what_to_fix(findings) or ["nothing"]:
            print(f"  {text}")
    return 0 if report.healthy(findings) else 1
