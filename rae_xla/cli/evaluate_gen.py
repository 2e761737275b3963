"""``rae-xla evaluate gen``: measure generated images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rae_xla.cli.evaluation_output import print_warnings, provenance, write_json
from rae_xla.cli.options import check_out_file, read_config, start_backend
from rae_xla.config.inputs import input_paths
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.evaluate.generation import GenReport
    from rae_xla.evaluate.image_sets import ImageSet
    from rae_xla.runtime import Backend


def evaluate_gen(args: argparse.Namespace, metrics: tuple[str, ...]) -> int:
    """Measure sets of images, print a table and write the report."""
    if not args.samples:
        raise UserError("evaluate gen needs --samples PATH: an .npz file, or a folder of images")
    comparing = [metric for metric in metrics if metric != "is"]
    if comparing and args.reference is None:
        raise UserError(
            f"{comparing[0]} needs --reference FILE.npz: moments (mu, sigma), images (arr_0) or "
            "both of the data set that the model was trained on, or a folder of shards; or request "
            "only --metrics is"
        )
    if args.reference is not None and not comparing:
        raise UserError("--reference is not used by the Inception Score: remove it")
    if args.fdr6_reference is not None and "fdr6" not in metrics:
        raise UserError("--fdr6-reference is used only by fdr6: add fdr6 to --metrics")
    config = read_config(args)
    given = [args.config, args.reference, args.fdr6_reference, *args.samples]
    check_out_file(args.out, inputs=[*given, *input_paths(config)])

    from rae_xla.evaluate.generation import check_sets
    from rae_xla.evaluate.image_sets import open_images
    from rae_xla.evaluate.references import check_generation_reference

    sets = [open_images(path, args.num_images) for path in args.samples]
    check_sets(sets, metrics)
    if args.reference is not None:
        check_generation_reference(args.reference, sets[0].side)
    backend = start_backend(config)
    report = measure_sets(args, config, backend, sets, metrics)
    if backend.process_index != 0:
        return 0
    print_report(report, backend)
    if args.out is not None:
        content = report.describe() | provenance(args, config, backend, metrics)
        write_json(args.out, content)
        print(args.out)
    return 0


def measure_sets(
    args: argparse.Namespace,
    config: RunConfig,
    backend: Backend,
    sets: Sequence[ImageSet],
    metrics: tuple[str, ...],
) -> GenReport:
    """Load networks and reference, and measure sets; all processes call this together."""
    from rae_xla.evaluate.generation import evaluate_generation, load_networks
    from rae_xla.evaluate.references import load_generation_reference
    from rae_xla.runtime.data_workers import worker_count

    batch_size = 64 if args.batch_size is None else args.batch_size
    first = backend.process_index == 0
    networks = load_networks(
        config.weights.inception,
        config.weights.dinov2,
        backend,
        metrics,
        fdr6=asdict(config.weights.fdr6),
        without=lambda others: f"--metrics {' '.join(others)}",
    )
    reference = None
    if args.reference is not None:
        reference = load_generation_reference(
            args.reference,
            sets[0].side,
            backend,
            networks,
            metrics,
            name=args.reference_name,
            fdr6=args.fdr6_reference,
            batch_size=batch_size,
            num_workers=worker_count(backend, config.data.num_workers),
            progress=first,
        )
    return evaluate_generation(
        sets,
        backend,
        networks,
        metrics=metrics,
        reference=reference,
        batch_size=batch_size,
        progress=first,
    )


def print_report(report: GenReport, backend: Backend) -> None:
    """Print the table of a report."""
    several = len(report.sets) > 1
    prefix = f"{len(report.sets)} sets of " if several else ""
    print(f"{prefix}{report.num_images} samples, {report.image_size} pixels a side")
    print(f"on {backend.description}")
    for name in report.metric_names:
        spread = f" +- {report.spread(name):.6f}" if several else ""
        print(f"  {name:<17} {report.mean(name):12.6f}{spread}")
    if several:
        for path, metrics in report.sets:
            print(f"  {path}: " + ", ".join(f"{n} {v:.6f}" for n, v in metrics.items()))
    if report.reference is not None:
        print(f"against {report.reference}")
    for metric, reason in report.left_out.items():
        print(f"left out: {metric}: {reason}")
    print_warnings(report.warnings)
