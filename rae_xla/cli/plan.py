"""``rae-xla plan``: predict memory, time and cost of a run on TPUs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rae_xla.cli.options import add_config, check_out_file, read_config
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

SWEEP = ("v5litepod-16", "v6e-16", "v4-32", "v5p-32")
"""Slices of 16 chips of every generation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--stage", choices=("stage1", "stage2"), help="default: stage2 if the file has stage_2"
    )
    parser.add_argument(
        "--topology",
        metavar="SLICE[,SLICE...]",
        help="TPU slices: v6e:4x4, or gcloud's v6e-16; 2*v6e-16 are two slices; several slices, "
        "separated by commas, give a table",
    )
    parser.add_argument(
        "--batch", metavar="N[,N...]", help="images per step (training.global_batch_size)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"print a table; unless given, topologies are {', '.join(SWEEP)} and batches 1, 2 and "
        "4 times the configured one",
    )
    parser.add_argument(
        "--effort",
        choices=("full", "fast"),
        default="fast",
        help="compiler effort; fast (the default) underestimates memory by up to 28%%",
    )
    parser.add_argument(
        "--analytic",
        action="store_true",
        help="do not compile: estimate from parameter and FLOP counts, in seconds",
    )
    parser.add_argument("--data", metavar="SHARDS", help="training shards whose images to count")
    parser.add_argument(
        "--images", type=int, metavar="N", help="images per epoch; default: ImageNet's 1,281,167"
    )
    parser.add_argument("--price", type=float, metavar="X", help="price of one chip for one hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results as JSON")
    parser.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="host memory for the compiler; default: what is available",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=3600,
        metavar="S",
        help="seconds for the compiler; default: 3600",
    )


def run(args: argparse.Namespace) -> int:
    """Print forecasts; return 1 if one of them does not fit, else 0."""
    config = read_config(args)
    stage = args.stage or ("stage2" if config.stage_2 is not None else "stage1")
    names = args.topology.split(",") if args.topology else list(SWEEP if args.sweep else ())
    if not names:
        raise UserError("no TPU given: give --topology v6e:4x4 (or v6e-16, ...), or --sweep")
    check_out_file(args.json, "--json")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price {args.price:g}: expected a number of at least 0")
    batches = _batches(args, config)

    from rae_xla.tools.plan.tpus import parse_topology

    topologies = [parse_topology(name) for name in names]

    from rae_xla.tools.plan.planner import PlanRequest, make_forecasts
    from rae_xla.tools.plan.tables import forecast_json, forecast_table, forecast_text
    from rae_xla.tools.plan.worker import GB, Limits, free_memory

    memory = free_memory() if args.max_memory is None else args.max_memory * GB
    request = PlanRequest(
        config=config,
        task=stage,
        effort=args.effort,
        images=_images(args),
        price=args.price,
        limits=Limits(memory, args.timeout),
        compile_step=not args.analytic,
    )
    forecasts = []
    for forecast in make_forecasts(request, topologies, batches):
        forecasts.append(forecast)
        print(forecast_text(forecast, args.effort) + "\n", flush=True)
        if args.json is not None:
            content = [forecast_json(finished, args.effort) for finished in forecasts]
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    if len(forecasts) > 1:
        print(forecast_table(forecasts))
    return 1 if any(forecast.fits is False for forecast in forecasts) else 0


def _batches(args: argparse.Namespace, config: RunConfig) -> list[int | None]:
    if args.batch:
        try:
            return [int(size) for size in args.batch.split(",")]
        except ValueError:
            raise UserError(f"--batch {args.batch}: expected numbers, such as 256,1024") from None
    configured = config.training.global_batch_size
    if args.sweep and configured:
        return [configured, 2 * configured, 4 * configured]
    return [None]


def _images(args: argparse.Namespace) -> int:
    if args.images is not None:
        if args.images < 1:
            raise UserError(f"--images {args.images}: expected at least 1")
        return int(args.images)
    if args.data:
        from rae_xla.data.mixture import open_training_data

        return len(open_training_data(args.data))

    from rae_xla.tools.plan.forecast import IMAGENET_IMAGES

    return IMAGENET_IMAGES
