"""Write the results of the quickstart as one page: ``report.html`` and its images.

    python scripts/quickstart/report.py --results results/quickstart

reads these files of the results folder:

    images/test/<digit>/*.png            real digits that the models were not trained on
    reconstructed/<digit>/*.png          the same digits after encoding and decoding
    samples/{plain,guided}/samples.npz    generated digits and the requested labels
    stage1/metrics.jsonl, stage2/metrics.jsonl
    judge.json                           written by judge.py
    times.tsv                            "step<TAB>seconds" lines, written by quickstart.sh
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np
from digits import read
from judge import read_generated, read_reconstructions
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

TEMPLATE = Path(__file__).with_name("report.template.html")
PER_ROW = 10
BACKGROUND = (29, 36, 48)
LABEL = (154, 166, 182)
# What the quickstart is held to.
GOALS = {"psnr": 24.0, "plain": 0.90, "guided": 0.97, "coverage": 0.80, "minutes": 12.0}


def sheet(
    rows: Sequence[np.ndarray], labels: Sequence[str], *, scale: int = 2, group: int = 1
) -> Image.Image:
    """Arrange rows of uint8 images (each N, H, W, 3) on a dark sheet, with a label for each row.

    The rows of a group of ``group`` rows have less space between them than the groups.
    """
    height, width = (side * scale for side in rows[0].shape[1:3])
    gap = height // 8
    font = ImageFont.load_default(size=20)
    margin = 2 * gap + round(max(font.getlength(label) for label in labels))
    columns = max(len(row) for row in rows)
    tops = [gap + i * (height + gap) + (i // group) * gap * (group > 1) for i in range(len(rows))]
    size = (margin + columns * (width + gap), tops[-1] + height + gap)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for top, row, label in zip(tops, rows, labels, strict=True):
        draw.text((margin / 2, top + height / 2), label, LABEL, font, anchor="mm")
        for j, image in enumerate(row):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(tile, (margin + j * (width + gap), top))
    return canvas


def sample_sheet(images: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Return a sheet of the first ``PER_ROW`` images of each class, one class per row."""
    classes = np.unique(labels)
    return sheet([images[labels == c][:PER_ROW] for c in classes], [str(c) for c in classes])


def reconstruction_sheet(
    real: np.ndarray, reconstructed: np.ndarray, labels: np.ndarray, per_class: int = 2
) -> Image.Image:
    """Return a sheet of ``per_class`` digits of each class, each above its reconstruction."""
    rows = []
    for k in range(per_class):
        chosen = [np.flatnonzero(labels == c)[k] for c in np.unique(labels)]
        rows += [real[chosen], reconstructed[chosen]]
    return sheet(rows, ["real", "decoded"] * per_class, scale=3, group=2)


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


def plot_losses(folder: Path, out: Path) -> None:
    """Plot the loss curves of both stages side by side."""
    panels = {
        "stage1": "Stage 1: the decoder (L1 on pixels)",
        "stage2": "Stage 2: the transformer (velocity)",
    }
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


def tiles(verdict: Mapping[str, Any], seconds: float) -> str:
    """Return the numbers at the top of the page, each with its goal and whether it was reached."""
    plain, guided = verdict["rows"][-2:]
    numbers = [
        ("Right digit, without guidance", plain["accuracy"], GOALS["plain"], "{:.0%}"),
        ("Right digit, with guidance", guided["accuracy"], GOALS["guided"], "{:.0%}"),
        ("Coverage of the test digits", plain["coverage"], GOALS["coverage"], "{:.0%}"),
        ("Reconstruction", verdict["psnr"], GOALS["psnr"], "{:.0f} dB"),
    ]
    shown = [
        tile(title, form.replace(".0", ".1").format(value), form.format(goal), value >= goal)
        for title, value, goal, form in numbers
    ]
    if seconds:
        goal = f"{GOALS['minutes']:.0f} min on 2 CPU cores"
        met = seconds <= 60 * GOALS["minutes"]
        shown.append(tile("Time, all steps", f"{clock(seconds)} min", goal, met))
    return "".join(shown)


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


def judge_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of judge.json as an HTML table."""

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"  # noqa: RUF001

    head = ("", "digits", "SVM accuracy", "Fréchet", "coverage", "twins", "copies")
    return html_table(
        head,
        [
            (
                row["name"],
                f"{row['count']:,}",
                percent(row["accuracy"]),
                f"{row['frechet']:.2f}",
                percent(row["coverage"]),
                percent(row["twins"]),
                percent(row["copies"]),
            )
            for row in rows
        ],
    )


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


def write_report(folder: Path) -> Path:
    """Write the page and its images into ``folder`` and return the path of the page."""
    verdict = json.loads((folder / "judge.json").read_text())
    real, reconstructed = read_reconstructions(folder / "images" / "test", folder / "reconstructed")
    labels = read(folder / "images" / "test")[1]
    reconstruction_sheet(real, reconstructed, labels).save(folder / "reconstructions.png")
    for name in ("plain", "guided"):
        images, requested = read_generated(folder / "samples" / name / "samples.npz")
        sample_sheet(images, requested).save(folder / f"samples_{name}.png")
    plot_losses(folder, folder / "losses.png")

    times = read_times(folder / "times.tsv")
    timing = ""
    if times:
        rows = [*times, ("total", sum(seconds for _, seconds in times))]
        shown = [(name, clock(seconds)) for name, seconds in rows]
        timing = f'<div class="card scroll">{html_table(("step", "min:s"), shown)}</div>'
    page = Template(TEMPLATE.read_text()).substitute(
        train_count=f"{verdict['rows'][0]['count']:,}",
        tiles=tiles(verdict, sum(seconds for _, seconds in times)),
        image_size=real.shape[1],
        latent_shape=" × ".join(map(str, latent_shape(folder))),  # noqa: RUF001
        psnr=f"{verdict['psnr']:.1f}",
        machine=f"{verdict['accuracy_on_test']:.1%}",
        table=judge_table(verdict["rows"]),
        times=timing,
        folder=escape(str(folder)),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def latent_shape(folder: Path) -> tuple[int, int, int]:
    """Return (channels, rows, columns) of the latents, from the config of the encoder."""
    config = json.loads((folder / "encoder" / "config.json").read_text())
    side = config["image_size"] // config["patch_size"]
    return config["hidden_size"], side, side


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Write report.html from the results of the quickstart."
    )
    parser.add_argument(
        "--results", type=Path, required=True, help="results folder of the quickstart"
    )
    print(write_report(parser.parse_args().results))


if __name__ == "__main__":
    main()
