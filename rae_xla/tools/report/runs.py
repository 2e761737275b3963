"""Reading of results folders, also of runs that are still running or were killed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.errors import UserError
from rae_xla.train.run_info import ENVIRONMENT_FILE

METRICS_FILE, CONFIG_FILE, SAMPLES_FOLDER = "metrics.jsonl", "config.yaml", "samples"
_IMAGE_NAME = re.compile(r"(.+)-(\d{8,})\.png")


@dataclass
class LoggedImage:
    """An image in the folder ``samples/`` of a run.

    Attributes:
        name: without step and suffix.
        step: at which it was saved.
        path: of the file.
    """

    name: str
    step: int
    path: StoragePath


@dataclass
class Run:
    """Content of a results folder.

    Attributes:
        name: of the folder.
        folder: the results folder, local or ``gs://``.
        metrics: values by name and step, in the order of the steps; only finite ones.
        images: in the order of the steps.
        config: every key by its dotted name; empty if the file cannot be read.
        starts: a dict per start of the run, oldest first (``train.run_info``).
        warnings: problems of the folder, as sentences.
    """

    name: str
    folder: StoragePath
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    images: list[LoggedImage] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int | None:
        """Last step with a metric."""
        return max((step for values in self.metrics.values() for step in values), default=None)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read results folders in order, each once; runs of the same name get longer names.

    Raises:
        UserError: if a folder is not the results folder of a run.
    """
    runs = [read_run(f) for f in {storage.real_path(str(f)): f for f in folders}.values()]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(storage.real_path(run.folder).split("/")[-2:])
    return runs


def read_run(location: str | Path) -> Run:
    """Read a results folder; raise ``UserError`` if it is not one."""
    folder = StoragePath(location)
    path = folder / METRICS_FILE
    if not storage.is_folder(folder):
        raise UserError(
            f"the folder {folder} does not exist: give results folders of `rae-xla train`"
        )
    if not storage.exists(path):
        names = storage.list_folders(folder)
        below = sorted(n for n in names if storage.exists(folder / n / METRICS_FILE))
        hint = (
            f"its subfolders {', '.join(below[:4])} have one: give {folder / below[0]}"
            if below
            else "give the --results-dir of `rae-xla train`, after the first steps are logged"
        )
        raise UserError(f"{folder} has no {METRICS_FILE}: {hint}")
    run = Run(storage.split(storage.real_path(folder))[1], folder)
    _read_metrics(run, path)
    _read_config(run, folder / CONFIG_FILE)
    run.starts = list(_objects(run, folder / ENVIRONMENT_FILE))
    samples = folder / SAMPLES_FOLDER
    for name in sorted(storage.list_files(samples) if storage.is_folder(samples) else ()):
        if match := _IMAGE_NAME.fullmatch(name):
            run.images.append(LoggedImage(match[1], int(match[2]), samples / name))
    run.images.sort(key=lambda image: image.step)
    if not run.metrics:
        run.warnings.append(f"{METRICS_FILE} has no metrics yet")
    return run


def _read_metrics(run: Run, path: StoragePath) -> None:
    """Read metrics.jsonl; if a step was logged twice, the later value wins."""
    found: dict[str, dict[int, float]] = {}
    for line in _objects(run, path):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, {})[step] = float(value)
    run.metrics = {name: dict(sorted(values.items())) for name, values in found.items()}


def _objects(run: Run, path: StoragePath) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file with one per line; add a warning for invalid lines."""
    invalid = 0
    try:
        lines = storage.read_bytes(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions"
        ) from error
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield line
        elif text.strip():
            invalid += 1
    if invalid:
        run.warnings.append(f"{path.name}: {invalid} invalid lines are left out")


def _read_config(run: Run, path: StoragePath) -> None:
    try:
        content = yaml.safe_load(storage.read_bytes(path).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        run.warnings.append(f"{path.name} is missing or invalid")
        return
    run.config = dict(flatten(content)) if isinstance(content, dict) else {}


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested mappings."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
