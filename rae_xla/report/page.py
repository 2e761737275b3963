"""The page: one HTML file that asks nothing of any network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import rae_xla
from rae_xla.report.pictures import embed
from rae_xla.report.runs import Run, flatten
from rae_xla.train.figures import FIGURES

POINTS = 2000
"""Of a curve; longer ones are drawn as the means of neighbouring points."""


def write_page(runs: Sequence[Run], out: Path) -> None:
    """Write the page of some runs; a file that is there is whole. Raises ``OSError``."""
    text = render(runs)
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, out)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    # No text of a run can end the element that holds it.
    data = json.dumps(page_data(runs), allow_nan=False).replace("<", "\\u003c")
    return Template(_part("page.html")).substitute(
        title=escape(title), style=_part("page.css"), script=_part("page.js"), data=data
    )


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script draws, as JSON has it."""
    shown = [_run_data(run) for run in runs]  # remarks are complete afterwards
    return {
        "runs": shown,
        "figures": _described({name for run in runs for name in run.figures}),
        "settings": _differences([run.config for run in runs]),
        "environment": _differences([_environment(run) for run in runs], all_of_them=True),
        "remarks": [f"{run.name}: {remark}" for run in runs for remark in run.remarks],
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "version": rae_xla.__version__,
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
        "figures": {name: thin(values) for name, values in run.figures.items()},
        "evaluations": _evaluations(run),
        "pictures": embed(run),
    }


def thin(values: Mapping[int, float], most: int = POINTS) -> tuple[list[int], list[float]]:
    """Steps and values of a curve; of more than ``most`` points, means of as many as it takes."""
    steps, points = list(values), list(values.values())
    size = -(-len(points) // most)
    if size <= 1:
        return steps, points
    parts = range(0, len(points), size)
    ends = [steps[min(i + size, len(steps)) - 1] for i in parts]
    return ends, [sum(points[i : i + size]) / len(points[i : i + size]) for i in parts]


def _evaluations(run: Run) -> list[dict[str, Any]]:
    found: dict[int, dict[str, float]] = {}
    for name, values in run.figures.items():
        if name.startswith("eval/"):
            for step, value in values.items():
                found.setdefault(step, {})[name.removeprefix("eval/")] = value
    return [{"step": step, "values": values} for step, values in sorted(found.items())]


def _described(names: set[str]) -> list[dict[str, str]]:
    """The figures there are, in the order of the list, with what they are."""
    left, described = sorted(names), []
    for figure in FIGURES:
        mine = [name for name in left if fnmatchcase(name, figure.name)]
        for name in sorted(mine, key=lambda name: (name.count("/"), name)):
            left.remove(name)
            about = "" if "*" in figure.name and figure.name.startswith("eval") else figure.about
            described.append({"name": name, "unit": figure.unit, "about": _plain_text(about)})
    return described + [{"name": name, "unit": "", "about": ""} for name in left]


def _plain_text(markdown: str) -> str:
    without_links = re.sub(r"[:;]? ?\[[^]]*\]\([^)]*\)", "", markdown)
    return without_links.replace("`", "").replace(": see below", "")


def _environment(run: Run) -> dict[str, Any]:
    """Of the newest start."""
    if not run.starts:
        return {}
    shown: dict[str, Any] = {
        "first start": str(run.starts[0].get("started_at", "")).replace("T", " ")[:16],
        "starts": len(run.starts),
    }
    for room in ("code", "hardware", "plan"):
        for key, value in flatten(run.starts[-1].get(room) or {}):
            if key.endswith("_bytes") and isinstance(value, int):
                key, value = key.removesuffix("_bytes"), _size(value)
            shown[key.replace("_", " ").replace(".", ": ")] = value
    return {key: value for key, value in shown.items() if key and value not in (None, {})}


def _differences(
    sides: Sequence[Mapping[str, Any]], *, all_of_them: bool = False
) -> list[dict[str, Any]]:
    """A row per key, with every side's value as text; ``differs`` where they are not all equal."""
    rows = []
    for key in dict.fromkeys(key for side in sides for key in side):
        texts = [_text(side.get(key)) if key in side else "–" for side in sides]  # noqa: RUF001
        if all_of_them and set(texts) <= {"", "–"}:  # noqa: RUF001
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


def _part(name: str) -> str:
    return resources.files("rae_xla.report").joinpath(name).read_text(encoding="utf-8")
