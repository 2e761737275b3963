"""Create the wandb dashboard of a project: a workspace with the panels for monitoring runs.

    python infra/wandb/dashboard.py --project rae_xla [--entity TEAM] [--name NAME]
    python infra/wandb/dashboard.py --dry-run

Needs `pip install wandb-workspaces` (the `dashboard` extra) and a wandb login; --dry-run prints the
panels as JSON and needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from rae_xla.config import TrackingConfig
from rae_xla.train.tracking.wandb_sink import wandb_place


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: heading of the panel.
        metrics: names from ``rae_xla/train/metrics.py``, or ``samples/...`` for images.
        log: whether the y axis is logarithmic.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False


SECTIONS = {
    "Learning": (
        Panel("Loss", ("train/loss",), log=True),
        Panel("Gradient norm", ("train/grad_norm",), log=True),
        Panel("Learning rate", ("opt/lr", "opt/disc_lr")),
        Panel("Loss terms (stage 1)", ("train/l1", "train/lpips", "train/gan")),
        Panel("Discriminator: loss", ("train/disc/loss",)),
        Panel("Discriminator: accuracy", ("train/disc/accuracy",)),
        Panel("Adaptive weight", ("train/adaptive_weight",), log=True),
    ),
    "Samples": (
        Panel("Samples (stage 2)", ("samples/stage2",)),
        Panel("Reconstructions (stage 1)", ("samples/stage1",)),
    ),
    "Quality": (
        Panel("FID", ("eval/fid",)),
        Panel("rFID", ("eval/rfid",)),
        Panel("PSNR", ("eval/psnr", "eval/model/psnr")),
        Panel("SSIM", ("eval/ssim", "eval/model/ssim")),
        Panel("LPIPS", ("eval/lpips", "eval/model/lpips")),
    ),
    "Speed": (
        Panel("Images per second", ("perf/images_per_second",)),
        Panel("Images per second per chip", ("perf/images_per_second_per_chip",)),
        Panel("Model FLOPs utilisation", ("perf/mfu",)),
        Panel("Step time and host time, s", ("perf/step_time", "perf/host_time")),
        Panel("Data wait, share of the time", ("perf/data_wait",)),
        Panel("Paused, s", ("perf/paused",)),
    ),
    "Health": (
        Panel("Skipped steps", ("train/skipped", "train/disc/skipped")),
        Panel("Rollbacks", ("train/rollbacks",)),
        Panel("Bad samples", ("data/bad_samples",)),
        Panel("Checkpoints: blocked and total time, s", ("ckpt/blocked_seconds", "ckpt/seconds")),
        Panel("Failed checkpoints", ("ckpt/failed",)),
        Panel("Compilations", ("perf/compilations",)),
        Panel("Operations that fell back to the CPU", ("perf/fallbacks",)),
        Panel("Memory, GB", ("perf/memory_gb", "perf/host_memory_gb")),
    ),
}


def make_workspace(project: str, entity: str, name: str) -> Any:
    """Return the workspace, which is not saved yet."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def make(panel: Panel) -> Any:
        if panel.metrics[0].startswith("samples/"):
            return reports.MediaBrowser(
                title=panel.title, media_keys=list(panel.metrics), num_columns=1
            )
        return reports.LinePlot(title=panel.title, y=list(panel.metrics), log_y=panel.log)

    sections = [
        workspaces.Section(name=title, panels=[make(panel) for panel in panels], is_open=True)
        for title, panels in SECTIONS.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


def own_entity() -> str:
    """Return the default entity of the logged-in user; errors of wandb propagate."""
    import wandb

    return str(wandb.Api().default_entity)


def as_json(workspace: Any) -> str:
    """Return sections and panels as JSON, as wandb-workspaces would send them."""
    view = json.loads(workspace._to_model().model_dump_json(by_alias=True))
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    shown = {
        section["name"]: [
            {
                "type": panel["viewType"],
                "title": panel["config"]["chartTitle"],
                "metrics": panel["config"].get("metrics") or panel["config"].get("mediaKeys"),
                "log": bool(panel["config"].get("yLogScale")),
            }
            for panel in section["panels"]
        ]
        for section in sections
    }
    head = {"entity": view["entity"], "project": view["project"], "name": view["displayName"]}
    return json.dumps(head | {"sections": shown}, indent=2)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", help="default: WANDB_PROJECT or PROJECT, else rae_xla")
    parser.add_argument("--entity", help="default: WANDB_ENTITY or ENTITY, else your default one")
    parser.add_argument(
        "--name", default="rae_xla", help="name of the workspace (default: rae_xla)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the panels and send nothing")
    args = parser.parse_args()
    place = wandb_place(TrackingConfig(project=args.project, entity=args.entity))
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        print(f"dashboard: {error}; pip install wandb-workspaces", file=sys.stderr)
        return 2
    project, entity = str(place["project"]), place["entity"]
    if args.dry_run:
        print(as_json(make_workspace(project, entity or "", args.name)))
        return 0
    if key := os.environ.get("WANDB_KEY"):
        os.environ.setdefault("WANDB_API_KEY", key)
    try:
        print(make_workspace(project, entity or own_entity(), args.name).save().url)
    except Exception as error:  # whatever wandb raises: no login, no network, no such project
        print(f"dashboard: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
