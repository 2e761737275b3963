"""Print mean and standard deviation over the seeds of the runs that judge.py measured.

    python scripts/examples/seed_table.py results/ablations_raev2/judge.json

Rows whose names differ only after "; seed" are one row of the table. The standard deviation has
n - 1 in the denominator.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

COLUMNS = {"frechet": "Fréchet", "coverage": "coverage", "accuracy": "SVM accuracy"}
Row = dict[str, float | str | None]


def cell(values: list[float]) -> str:
    """Return the mean, with the standard deviation if there are several values."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def table(rows: list[Row]) -> str:
    """Return a Markdown table of the generated sets; real digits have no seed."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name, separator, _ = str(row["name"]).partition("; seed")
        if separator:
            groups.setdefault(name, []).append(row)
    lines = [
        "| " + " | ".join(["run", "seeds", *COLUMNS.values()]) + " |",
        "|" + "---|" * (2 + len(COLUMNS)),
    ]
    for name, members in groups.items():
        cells = [cell([float(row[key] or 0) for row in members]) for key in COLUMNS]
        lines.append("| " + " | ".join([name, str(len(members)), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(table(content["rows"]))


if __name__ == "__main__":
    main()
