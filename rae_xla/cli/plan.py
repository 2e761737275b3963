"""``rae-xla plan``: what a run will cost, before a pod is rented."""

from __future__ import annotations

import argparse
import json
import math
import sys
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
        "--stage", choices=("stage1", "stage2"), help="default: stage2 if the file describes it"
    )
    parser.add_argument(
        "--topology",
        metavar="SLICE[,SLICE...]",
        help="TPU slices: v6e:4x4, or gcloud's v6e-16; 2*v6e-16 are two; several give a table",
    )
    parser.add_argument(
        "--batch", metavar="N[,N...]", help="images of a step (training.global_batch_size)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"a table: where not given, {', '.join(SWEEP)} and 1, 2 and 4 times the batch",
    )
    parser.add_argument(
        "--effort",
        choices=("full", "fast"),
        default="fast",
        help="of the compiler; fast (the default) is a preview, with up to 28%% less memory",
    )
    parser.add_argument(
        "--analytic", action="store_true", help="compile nothing: arithmetic alone, in seconds"
    )
    parser.add_argument("--data", metavar="SHARDS", help="training shards, to count their images")
    parser.add_argument(
        "--images", type=int, metavar="N", help="images of an epoch; default: ImageNet's 1,281,167"
    )
    parser.add_argument("--price", type=float, metavar="X", help="of one chip for one hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    parser.add_argument(
        "--max-memory", type=float, metavar="GB", help="of the compiler; default: what is free"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600, metavar="S", help="of the compiler; default: 3600"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, and print; status 1 where a run does not fit."""
    config = read_config(args)
    stage = args.stage or ("stage2" if config.stage_2 is not None else "stage1")
    names = args.topology.split(",") if args.topology else list(SWEEP if args.sweep else ())
    if not names:
        raise UserError("which TPU? Give --topology v6e:4x4 (or v6e-16, ...), or --sweep")
    check_out_file(args.json, "--json")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price {args.price:g} must be a number from 0 on")
    batches = _batches(args, config)

    from rae_xla.plan.chips import parse_topology

    topologies = [parse_topology(name) for name in names]

    from rae_xla.plan.planner import Request, make_plans
    from rae_xla.plan.report import as_json, fits, text_report, text_table
    from rae_xla.plan.worker import GB, Limits, free_memory

    memory = free_memory() if args.max_memory is None else args.max_memory * GB
    request = Request(
        config=config,
        stage=stage,
        effort=args.effort,
        images=_images(args),
        price=args.price,
        limits=Limits(memory, args.timeout),
        compile_step=not args.analytic,
    )
    plans = []
    for plan in make_plans(request, topologies, batches, _say):
        plans.append(plan)
        print(text_report(plan, args.effort) + "\n", flush=True)
        if args.json is not None:
            content = [as_json(plan, args.effort) for plan in plans]
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    if len(plans) > 1:
        print(text_table(plans))
    return 1 if any(fits(plan) is False for plan in plans) else 0


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
            raise UserError(f"--images {args.images} must be at least 1")
        return int(args.images)
    if args.data:
        from rae_xla.data.mixture import open_training_data

        return len(open_training_data(args.data))

    from rae_xla.plan.forecast import IMAGENET

    return IMAGENET


def _say(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)
