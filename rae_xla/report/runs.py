"""What a results folder tells of its run, which may be under way, or cut short."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rae_xla.errors import UserError
from rae_xla.train.environment import ENVIRONMENT_FILE

METRICS, CONFIG, SAMPLES = "metrics.jsonl", "config.yaml", "samples"
_PICTURE = re.compile(r"(.+)-(\d{8,})\.png")


@dataclass
class Picture:
    """A picture of a run's ``samples/``."""

    name: str
    step: int
    path: Path


@dataclass
class Run:
    """A run as its folder tells it.

    Attributes:
        name: of the folder.
        folder: of the results.
        figures: by name, of each step its value, in the order of the steps; finite ones only.
        pictures: by step.
        config: every key by its dotted name; empty where it cannot be read.
        starts: a dict per start of the run, the oldest first.
        remarks: what was wrong with the folder.
    """

    name: str
    folder: Path
    figures: dict[str, dict[int, float]] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """The newest step there is a figure of."""
        return max((step for values in self.figures.values() for step in values), default=None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read results folders, each once, in their order.

    Raises:
        UserError: a folder is none of a run.
    """
    runs = [read_run(folder) for folder in {f.resolve(): f for f in folders}.values()]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


def read_run(folder: Path) -> Run:
    """Read one results folder; raises ``UserError`` if it is none."""
    path = folder / METRICS
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; give results folders of `rae-xla train`"
        )
    if not path.is_file():
        below = sorted(p.parent.name for p in folder.glob(f"*/{METRICS}"))
        hint = (
            f"there is one in {', '.join(below[:4])}: give {folder / below[0]}"
            if below
            else "give the --results-dir of `rae-xla train`, once its first steps are logged"
        )
        raise UserError(f"{folder} has no {METRICS}: {hint}")
    run = Run(folder.resolve().name, folder)
    _read_figures(run, path)
    _read_config(run, folder / CONFIG)
    run.starts = list(_objects(run, folder / ENVIRONMENT_FILE))
    for picture in sorted((folder / SAMPLES).glob("*.png")):
        if match := _PICTURE.fullmatch(picture.name):
            run.pictures.append(Picture(match[1], int(match[2]), picture))
    run.pictures.sort(key=lambda found: found.step)
    if not run.figures:
        run.remarks.append(f"{METRICS} has no figures yet")
    return run


def _read_figures(run: Run, path: Path) -> None:
    """Of a step that was logged twice, the later value counts."""
    found: dict[str, dict[int, float]] = {}
    for line in _objects(run, path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, {})[step] = float(value)
    run.figures = {name: dict(sorted(values.items())) for name, values in found.items()}


def _objects(run: Run, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line; lines that are none are counted."""
    if not path.is_file():
        return
    unreadable = 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield line
        elif text.strip():
            unreadable += 1
    if unreadable:
        run.remarks.append(f"{path.name}: {unreadable} lines cannot be read and are left out")


def _read_config(run: Run, path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        run.remarks.append(f"{path.name} is missing or cannot be read")
        return
    run.config = dict(flatten(content)) if isinstance(content, dict) else {}


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names and values."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
