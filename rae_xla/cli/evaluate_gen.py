"""``rae-xla evaluate gen``: what samples are worth."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rae_xla.cli.evaluation_report import circumstances, print_warnings, write_json
from rae_xla.cli.options import check_out_file, read_config
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.evaluate.gen_report import GenReport
    from rae_xla.runtime import Runtime


def evaluate_gen(args: argparse.Namespace, metrics: tuple[str, ...]) -> int:
    """Measure sets of samples, print a table, write the report."""
    if not args.samples:
        raise UserError("evaluate gen needs --samples PATH: an .npz file, or a folder of pictures")
    against = [metric for metric in metrics if metric != "is"]
    if against and args.reference is None:
        raise UserError(
            f"{against[0]} needs --reference FILE.npz: moments (mu, sigma), images (arr_0) or both "
            "of the data set the samples imitate, or a folder of shards; or ask for --metrics is"
        )
    if args.reference is not None and not against:
        raise UserError("--reference is nothing that the Inception Score compares with")
    batch_size = 64 if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images: give 1 at least")
    check_out_file(args.out)
    config = read_config(args)

    from rae_xla.evaluate.gen_reference import check_reference, load_gen_reference
    from rae_xla.evaluate.generation import check_sets, evaluate_generation
    from rae_xla.evaluate.networks import load_networks
    from rae_xla.evaluate.picture_sets import open_pictures
    from rae_xla.runtime import start

    sets = [open_pictures(path, args.num_images) for path in args.samples]
    check_sets(sets, metrics)
    if args.reference is not None:
        check_reference(args.reference, sets[0].side)
    runtime = start(config.runtime, config.mesh, seed=config.training.global_seed)
    speaks = runtime.process_index == 0
    networks = load_networks(
        config.weights.inception,
        config.weights.dinov2,
        runtime,
        metrics,
        without=lambda others: f"--metrics {' '.join(others)}",
    )
    reference = None
    if args.reference is not None:
        reference = load_gen_reference(
            args.reference,
            sets[0].side,
            runtime,
            networks,
            metrics,
            batch_size=batch_size,
            num_workers=config.data.num_workers,
            progress=speaks,
        )
    report = evaluate_generation(
        sets,
        runtime,
        networks,
        metrics=metrics,
        reference=reference,
        batch_size=batch_size,
        progress=speaks,
    )
    if not speaks:
        return 0
    _print(report, runtime)
    if args.out is not None:
        found = report.describe() | circumstances(args, config, runtime, metrics)
        write_json(args.out, found)
        print(f"{args.out}")
    return 0


def _print(report: GenReport, runtime: Runtime) -> None:
    several = len(report.sets) > 1
    what = f"{len(report.sets)} sets of " if several else ""
    print(f"{what}{report.num_images} samples, {report.image_size} pixels a side")
    print(f"on {runtime.description}")
    for name in report.metrics:
        spread = f" +- {report.spread(name):.6f}" if several else ""
        print(f"  {name:<17} {report.mean(name):12.6f}{spread}")
    if several:
        for path, figures in report.sets:
            print(f"  {path}: " + ", ".join(f"{n} {v:.6f}" for n, v in figures.items()))
    if report.reference is not None:
        print(f"against {report.reference}")
    for metric, why in report.left_out.items():
        print(f"left out: {metric}: {why}")
    print_warnings(report.warnings)
