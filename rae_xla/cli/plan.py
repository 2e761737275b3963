"""``rae-xla plan``: predict memory, time and cost of a run on TPUs or GPUs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from rae_xla import storage
from rae_xla.cli.options import NumberAction, PathAction, add_config, check_out_file, read_config
from rae_xla.config.inputs import input_paths
from rae_xla.config.ranges import COUNT, LONGEST_WAIT, Range
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.tools.plan.worker import Limits

SWEEP = ("v5litepod-16", "v6e-16", "v4-32", "v5p-32")
"""Slices of 16 chips of every generation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config(parser)
    parser.add_argument(
        "--stage",
        choices=("stage1", "stage2", "t2i"),
        help="default: t2i if the file has text_to_image, stage2 if it has stage_2",
    )
    parser.add_argument(
        "--topology",
        metavar="SLICE[,SLICE...]",
        help="TPU slices: v6e:4x4, or gcloud's v6e-16; 2*v6e-16 are two slices; several slices, "
        "separated by commas, give a table",
    )
    parser.add_argument(
        "--gpus",
        metavar="NxCARD[,NxCARD...]",
        help="GPUs instead of TPUs: 8xh100, 1x4090; several, separated by commas, give a table",
    )
    parser.add_argument(
        "--batch", metavar="N[,N...]", help="images per step (training.global_batch_size)"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"print a table; unless given, topologies are {', '.join(SWEEP)} and batches 1, 2 and "
        "4 times the configured one; with --gpus: eager, compiled and rematerialised",
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
    parser.add_argument(
        "--data",
        action=PathAction,
        metavar="SHARDS",
        help="training shards whose images to count",
    )
    parser.add_argument(
        "--images",
        action=NumberAction,
        accepted=COUNT,
        type=int,
        metavar="N",
        help="images per epoch; default: ImageNet's 1,281,167",
    )
    parser.add_argument(
        "--price",
        action=NumberAction,
        accepted=Range(least=0, most=1e6),
        type=float,
        metavar="X",
        help="price of one chip for one hour",
    )
    parser.add_argument(
        "--json", action=PathAction, metavar="FILE", help="also write all results as JSON"
    )
    parser.add_argument(
        "--max-memory",
        action=NumberAction,
        accepted=Range(above=0, most=1e6),
        type=float,
        metavar="GB",
        help="host memory for the compiler; default: what is available",
    )
    parser.add_argument(
        "--timeout",
        action=NumberAction,
        accepted=Range(above=0, most=LONGEST_WAIT),
        type=float,
        default=3600,
        metavar="S",
        help="seconds for the compiler; default: 3600",
    )


def run(args: argparse.Namespace) -> int:
    """Print forecasts; return 1 if one of them does not fit, else 0."""
    config = read_config(args)
    check_out_file(args.json, "--json", inputs=[args.config, args.data, *input_paths(config)])
    if not args.gpus:
        return _run_tpus(args, config)
    if args.topology:
        raise UserError("--gpus and --topology: give only one of them")
    return _run_gpus(args, config)


def _run_tpus(args: argparse.Namespace, config: RunConfig) -> int:
    names = args.topology.split(",") if args.topology else list(SWEEP if args.sweep else ())
    if not names:
        raise UserError(
            "no devices given: give --topology v6e:4x4 (or v6e-16, ...), --gpus 8xh100, or --sweep"
        )
    batches = _batches(args, config, multiples=args.sweep)

    from rae_xla.tools.plan.tpus import parse_topology

    topologies = [parse_topology(name) for name in names]

    from rae_xla.tools.plan.planner import PlanRequest, make_forecasts
    from rae_xla.tools.plan.tables import forecast_json, forecast_table, forecast_text

    request = PlanRequest(
        config=config,
        task=_stage(args, config),
        effort=args.effort,
        images=_images(args),
        price=args.price,
        limits=_limits(args),
        compile_step=not args.analytic,
    )
    forecasts = []
    for forecast in make_forecasts(request, topologies, batches):
        forecasts.append(forecast)
        print(forecast_text(forecast, args.effort) + "\n", flush=True)
        _write_json(args, [forecast_json(finished, args.effort) for finished in forecasts])
    if len(forecasts) > 1:
        print(forecast_table(forecasts))
    return 1 if any(forecast.fits is False for forecast in forecasts) else 0


def _run_gpus(args: argparse.Namespace, config: RunConfig) -> int:
    from rae_xla.tools.plan.gpu.cards import parse_gpus

    clusters = [parse_gpus(name) for name in args.gpus.split(",")]
    batches = _batches(args, config, multiples=False)

    from rae_xla.tools.plan.gpu.output import (
        gpu_forecast_json,
        gpu_forecast_table,
        gpu_forecast_text,
    )
    from rae_xla.tools.plan.gpu.planner import GpuPlanRequest, make_gpu_forecasts

    request = GpuPlanRequest(
        config=config,
        task=_stage(args, config),
        images=_images(args),
        price=args.price,
        limits=_limits(args),
        variants=args.sweep,
    )
    forecasts = []
    for forecast in make_gpu_forecasts(request, clusters, batches):
        forecasts.append(forecast)
        print(gpu_forecast_text(forecast) + "\n", flush=True)
        _write_json(args, [gpu_forecast_json(finished) for finished in forecasts])
    if len(forecasts) > 1:
        print(gpu_forecast_table(forecasts))
    return 0 if all(forecast.fits for forecast in forecasts) else 1


def _stage(args: argparse.Namespace, config: RunConfig) -> str:
    if args.stage:
        return str(args.stage)
    if config.text_to_image is not None:
        return "t2i"
    return "stage2" if config.stage_2 is not None else "stage1"


def _limits(args: argparse.Namespace) -> Limits:
    from rae_xla.tools.plan.worker import GB, Limits, free_memory

    memory = free_memory() if args.max_memory is None else args.max_memory * GB
    return Limits(memory, args.timeout)


def _write_json(args: argparse.Namespace, content: list[dict[str, Any]]) -> None:
    if args.json is not None:
        storage.write_bytes(args.json, (json.dumps(content, indent=1) + "\n").encode())


def _batches(args: argparse.Namespace, config: RunConfig, *, multiples: bool) -> list[int | None]:
    """Return the batch sizes to plan; None for the configured one."""
    if args.batch:
        try:
            sizes = [int(size) for size in args.batch.split(",")]
        except ValueError:
            raise UserError(f"--batch {args.batch}: expected numbers, such as 256,1024") from None
        if wrong := [size for size in sizes if not COUNT.contains(size)]:
            raise UserError(f"--batch {args.batch}: expected {COUNT.describe(wrong[0])}")
        return list(sizes)
    configured = config.training.global_batch_size
    if multiples and configured:
        return [configured, 2 * configured, 4 * configured]
    return [None]


def _images(args: argparse.Namespace) -> int:
    if args.images is not None:
        return int(args.images)
    if args.data:
        from rae_xla.data.mixture import open_training_data

        return len(open_training_data(args.data))

    from rae_xla.tools.plan.forecast import IMAGENET_IMAGES

    return IMAGENET_IMAGES
