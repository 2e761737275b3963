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

import numpy as np
from digits import read
from judge import read_generated, read_reconstructions
from page import clock, html_table, plot_losses, read_times, tile
from PIL import Image, ImageDraw, ImageFont

TEMPLATE = Path(__file__).with_name("report.template.html")
PER_ROW = 10
BACKGROUND = (29, 36, 48)
LABEL = (154, 166, 182)
PANELS = {
    "stage1": "Stage 1: the decoder (L1 on pixels)",
    "stage2": "Stage 2: the transformer (velocity)",
}
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


def write_report(folder: Path) -> Path:
    """Write the page and its images into ``folder`` and return the path of the page."""
    verdict = json.loads((folder / "judge.json").read_text())
    real, reconstructed = read_reconstructions(folder / "images" / "test", folder / "reconstructed")
    labels = read(folder / "images" / "test")[1]
    reconstruction_sheet(real, reconstructed, labels).save(folder / "reconstructions.png")
    for name in ("plain", "guided"):
        images, requested = read_generated(folder / "samples" / name / "samples.npz")
        sample_sheet(images, requested).save(folder / f"samples_{name}.png")
    plot_losses(folder, PANELS, folder / "losses.png")

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
