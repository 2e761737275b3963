"""The HTML page: a single file without network requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rae_xla import storage
from rae_xla.tools.report.images import embed_images
from rae_xla.tools.report.runs import Run, flatten
from rae_xla.train.metrics import METRICS
from rae_xla.version import __version__

FID_THRESHOLDS = (2, 3, 5, 10, 20, 50)
"""FIDs for which the page states the epochs that a run needed to reach them (EP_FID@k of RAEv2)."""

MAX_POINTS = 2000
"""Points per curve; longer curves are reduced to means of adjacent points."""


def write_page(runs: Sequence[Run], out: str | Path) -> None:
    """Write the page atomically, locally or to ``gs://``; raise ``OSError`` if that fails."""
    storage.write_bytes(str(out), render(runs).encode())


def render(runs: Sequence[Run]) -> str:
    """Return the HTML of the page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    # Escaped, so that no text of a run can end the <script> element.
    data = json.dumps(page_data(runs), allow_nan=False).replace("<", "\\u003c")
    return Template(_asset("page.html")).substitute(
        title=escape(title), style=_asset("page.css"), script=_asset("page.js"), data=data
    )


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the data that the page's script shows."""
    shown = [_run_data(run) for run in runs]  # adds warnings to the runs
    return {
        "runs": shown,
        "metrics": _describe_metrics({name for run in runs for name in run.metrics}),
        "settings": _differences([run.config for run in runs]),
        "environment": _differences([_environment(run) for run in runs], skip_empty=True),
        "warnings": [f"{run.name}: {warning}" for run in runs for warning in run.warnings],
        "created": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "version": __version__,
    }


def _run_data(run: Run) -> dict[str, Any]:
    plan = run.starts[-1].get("plan", {}) if run.starts else {}
    return {
        "name": run.name,
        "folder": str(run.folder),
        "stage": plan.get("stage"),
        "last_step": run.last_step,
        "steps": plan.get("steps"),
        "starts": len(run.starts),
        "metrics": {name: thin(values) for name, values in run.metrics.items()},
        "evaluations": _evaluations(run),
        "epochs_to_fid": epochs_to_fid(run),
        "images": embed_images(run),
    }


def thin(
    values: Mapping[int, float], max_points: int = MAX_POINTS
) -> tuple[list[int], list[float]]:
    """Return steps and values of a curve, reduced to ``max_points`` means if it is longer."""
    steps, points = list(values), list(values.values())
    size = -(-len(points) // max_points)
    if size <= 1:
        return steps, points
    parts = range(0, len(points), size)
    ends = [steps[min(i + size, len(steps)) - 1] for i in parts]
    return ends, [sum(points[i : i + size]) / len(points[i : i + size]) for i in parts]


def _evaluations(run: Run) -> list[dict[str, Any]]:
    found: dict[int, dict[str, float]] = {}
    for name, values in run.metrics.items():
        if name.startswith("eval/"):
            for step, value in values.items():
                found.setdefault(step, {})[name.removeprefix("eval/")] = value
    return [{"step": step, "values": values} for step, values in sorted(found.items())]


def epochs_to_fid(run: Run) -> dict[str, float]:
    """Return EP_FID@k: the epochs until the FID of samples without guidance was at most k.

    The evaluations of a run sample without guidance. Thresholds that were not reached are left out,
    as are all for a run that did not record the length of an epoch.
    """
    plan = run.starts[-1].get("plan", {}) if run.starts else {}
    per_epoch, fids = plan.get("steps_per_epoch"), run.metrics.get("eval/fid", {})
    if not per_epoch:
        return {}
    found: dict[str, float] = {}
    for threshold in FID_THRESHOLDS:
        reached = [step for step, value in sorted(fids.items()) if value <= threshold]
        if reached:
            found[f"EP_FID@{threshold}"] = round(reached[0] / per_epoch, 2)
    return found


def _describe_metrics(names: set[str]) -> list[dict[str, str]]:
    """Return name, unit and description of metrics, in the order of ``train.metrics.METRICS``."""
    remaining, described = sorted(names), []
    for metric in METRICS:
        matching = [name for name in remaining if fnmatchcase(name, metric.name)]
        for name in sorted(matching, key=lambda name: (name.count("/"), name)):
            remaining.remove(name)
            # The description of a family of evaluation metrics does not explain one of them.
            family = "*" in metric.name and metric.name.startswith("eval")
            about = "" if family else _plain_text(metric.description)
            described.append({"name": name, "unit": metric.unit, "about": about})
    return described + [{"name": name, "unit": "", "about": ""} for name in remaining]


def _plain_text(markdown: str) -> str:
    """Remove links and code marks."""
    without_links = re.sub(r"[:;]? ?\[[^]]*\]\([^)]*\)", "", markdown)
    return without_links.replace("`", "").replace(": see below", "")


def _environment(run: Run) -> dict[str, Any]:
    """Return the rows of the environment table, from the last start."""
    if not run.starts:
        return {}
    shown: dict[str, Any] = {
        "first start": str(run.starts[0].get("started_at", "")).replace("T", " ")[:16],
        "starts": len(run.starts),
    }
    for section in ("code", "hardware", "plan"):
        for key, value in flatten(run.starts[-1].get(section) or {}):
            if key.endswith("_bytes") and isinstance(value, int):
                key, value = key.removesuffix("_bytes"), _size(value)
            shown[key.replace("_", " ").replace(".", ": ")] = value
    return {key: value for key, value in shown.items() if key and value not in (None, {})}


def _differences(
    columns: Sequence[Mapping[str, Any]], *, skip_empty: bool = False
) -> list[dict[str, Any]]:
    """Return a row per key with the value of each column as text, and whether they differ.

    Args:
        columns: one mapping per run.
        skip_empty: leave out keys without a value in any column.
    """
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        texts = [_text(column.get(key)) if key in column else "–" for column in columns]  # noqa: RUF001
        if skip_empty and set(texts) <= {"", "–"}:  # noqa: RUF001
            continue
        rows.append({"key": key, "values": texts, "differs": len(set(texts)) > 1})
    return rows


def _size(num_bytes: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _asset(name: str) -> str:
    return resources.files("rae_xla.tools.report").joinpath(name).read_text(encoding="utf-8")
