"""``rae-xla doctor``: check everything that a run needs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rae_xla.cli.options import PathAction
from rae_xla.config.paths import LOCAL

if TYPE_CHECKING:
    from rae_xla.tools.doctor.finding import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config",
        action=PathAction,
        rule=LOCAL,
        metavar="FILE",
        help="YAML file of the run, whose data, mesh and storage to check",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace those of the file, such as data.train=gs://bucket/shards",
    )
    parser.add_argument(
        "--results-dir",
        action=PathAction,
        metavar="DIR",
        help="results folder of the run, to check",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Run the checks and print their findings; return 1 if one failed, else 0."""
    from rae_xla.config import load_config
    from rae_xla.tools.doctor import devices, files, output, software, tpu_host
    from rae_xla.tools.doctor.finding import DoctorContext, run_checks

    config = load_config(args.config, overrides=args.overrides)
    context = DoctorContext(
        config, config_given=args.config is not None, results_dir=args.results_dir
    )
    checks = {
        software.VERSIONS: software.check_versions,
        software.ENVIRONMENT: software.check_environment,
        files.STORAGE: files.check_storage,
        files.DATA: files.check_data,
        software.TRACKING: software.check_tracking,
        tpu_host.TPU_HOST: tpu_host.check_tpu_host,
        devices.DEVICES: devices.check_devices,
        devices.SPEED: devices.check_speed,
        devices.HOSTS: devices.check_clocks,
    }
    findings: list[Finding] = []

    def print_text(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    def print_section(section: str) -> None:
        print_text(f"\n{section}")

    def record(found: Iterable[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            print_text(output.format_finding(finding))

    record(run_checks(context, checks, print_section))
    if context.backend is not None and context.backend.process_count > 1:
        print_section(output.OTHER_HOSTS)
        record(output.problems_of_other_hosts(context.backend, findings))
    if args.json:
        print(output.findings_json(findings))
    else:
        print("\nwhat to fix")
        for text in output.fixes(findings) or ["nothing"]:
            print(f"  {text}")
    return 0 if output.passed(findings) else 1
