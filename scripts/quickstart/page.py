"""What the pages of the quickstarts have in common: tiles, tables, times and loss curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator


def read_losses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and losses from a ``metrics.jsonl``; lines without a loss are skipped.

    A resumed run may have logged a step twice: the last line counts.
    """
    losses: dict[int, float] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            losses[int(row["step"])] = float(row["train/loss"])
    steps = np.array(sorted(losses))
    return steps, np.array([losses[step] for step in steps])


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over ``window`` values up to each one (fewer at the beginning)."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(folder: Path, panels: Mapping[str, str], out: Path) -> None:
    """Plot the loss curves of two runs side by side.

    Args:
        folder: of the results folders of the runs.
        panels: names of the results folders, with their titles.
        out: image file to write.
    """
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), dpi=160, layout="constrained")
        for axis, (stage, title) in zip(axes, panels.items(), strict=True):
            steps, losses = read_losses(folder / stage / "metrics.jsonl")
            smooth = running_mean(losses, max(1, len(losses) // 25))
            axis.plot(steps, losses, color="#3b6fb6", alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth, color="#3b6fb6", linewidth=1.8)
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set(title=title, xlabel="step", ylabel="loss")
            axis.grid(alpha=0.2)
        figure.savefig(out)
        plt.close(figure)


def tile(title: str, value: str, goal: str, met: bool) -> str:
    """Return the HTML of one such number."""
    mark, kind = ("✓", "met") if met else ("✗", "missed")
    return (
        f'<div class="tile"><span>{escape(title)}</span><b>{escape(value)}</b>'
        f'<span class="goal {kind}">{mark} goal {escape(goal)}</span></div>'
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; all cells are escaped."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def read_times(path: Path) -> list[tuple[str, float]]:
    """Return (step, seconds) pairs in the order they were first run; none if there is no file.

    A step that was interrupted and resumed has several lines, which are added.
    """
    times: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, seconds = line.partition("\t")
        times[name] = times.get(name, 0.0) + float(seconds)
    return list(times.items())


def clock(seconds: float) -> str:
    """Return a duration as minutes and seconds: ``3:07``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
