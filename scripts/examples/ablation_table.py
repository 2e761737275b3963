"""Summarise the runs of scripts/examples/ablations.sh in a table and a plot.

    python scripts/examples/ablation_table.py results/ablations gan tau lr lpips

Losses are means over the last tenth of the log lines of a run; PSNR and SSIM are those of the last
evaluation, on validation images. Total losses of runs with different weights are not comparable.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

COLUMNS = {
    "total": "train/loss",
    "L1": "train/l1",
    "LPIPS": "train/lpips",
    "GAN": "train/gan",
    "D loss": "train/disc/loss",
    "PSNR": "eval/psnr",
    "SSIM": "eval/ssim",
}
RUNS = {
    "gan": {"base": "GAN on", "gan_off": "GAN off"},
    "tau": {"base": "tau 0.8", "tau_0": "tau 0"},
    "lr": {"base": "lr as in base", "lr_1e-4": "half of it", "lr_4e-4": "double"},
    "lpips": {"base": "LPIPS weight 1", "lpips_0.5": "0.5", "lpips_2": "2"},
}
LAST = 0.1
Lines = list[dict[str, float]]


def read(folder: Path, run: str) -> Lines:
    """Return the lines of the metrics file of a run."""
    path = folder / run / "metrics.jsonl"
    if not path.exists():
        sys.exit(f"ablation_table: {path} does not exist: has the run {run} been trained?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def at_the_end(lines: Lines, name: str) -> float | None:
    """Return the mean of the last values of a metric, or None if the run has no such metric."""
    values = [line[name] for line in lines if name in line]
    if not values:
        return None
    return mean(values[-max(1, round(LAST * len(values))) :])


def table(runs: dict[str, Lines], labels: dict[str, str]) -> str:
    """Return a Markdown table with one line per run."""
    width = max(map(len, labels.values()))
    rows = [[f"{'run':<{width}}", *(f"{name:>8}" for name in COLUMNS)]]
    rows.append(["-" * width, *("-------:" for _ in COLUMNS)])
    for run, lines in runs.items():
        found = [at_the_end(lines, key) for key in COLUMNS.values()]
        cells = [f"{'-' if value is None else f'{value:.4f}':>8}" for value in found]
        rows.append([f"{labels[run]:<{width}}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(runs: dict[str, Lines], names: list[str], path: Path) -> None:
    """Plot L1 over the steps, with one panel per ablation."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.2), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        for (run, label), colour in zip(
            RUNS[name].items(), ("#222222", "#0072b2", "#d55e00"), strict=False
        ):
            points = [(line["step"], line["train/l1"]) for line in runs[run] if "train/l1" in line]
            panel.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.3)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.set_yscale("log")
        panel.grid(alpha=0.25, which="both")
        panel.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("L1")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the command line: print and write the table, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=RUNS)
    args = parser.parse_args()
    labels = {"base": "base"}
    for name in args.names:
        labels |= {
            run: f"{name} {label}" if name not in label.lower() else label
            for run, label in RUNS[name].items()
            if run != "base"
        }
    runs = {run: read(args.folder, run) for run in labels}
    text = table(runs, labels)
    print(text)
    (args.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(runs, args.names, args.folder / "plot.png")
    print(f"\n{args.folder}/table.md, {args.folder}/plot.png")


if __name__ == "__main__":
    main()
