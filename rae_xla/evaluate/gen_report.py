"""What was found of generated pictures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rae_xla.evaluate.reference import Reference


@dataclass(frozen=True)
class GenReport:
    """What was measured, over what, against what."""

    sets: tuple[tuple[str, dict[str, float]], ...]
    """Every set's name and figures."""
    num_images: int
    """In each set."""
    image_size: int
    reference: Reference | None
    left_out: dict[str, str]
    """Metrics that were asked for and could not be measured, and why."""
    warnings: tuple[str, ...] = ()

    def mean(self, metric: str) -> float:
        """Over the sets."""
        return statistics.fmean(figures[metric] for _, figures in self.sets)

    def spread(self, metric: str) -> float | None:
        """The standard deviation over the sets (n - 1 in the denominator); None of one set."""
        values = [figures[metric] for _, figures in self.sets]
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the figures."""
        return tuple(self.sets[0][1])

    def describe(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "metrics": {
                name: {
                    "value": self.mean(name),
                    "spread": self.spread(name),
                    "unit": None,
                    "images": self.num_images,
                }
                for name in self.metrics
            },
            "sets": [{"path": name, "metrics": figures} for name, figures in self.sets],
            "num_images": self.num_images,
            "image_size": self.image_size,
            "reference": self.reference.describe() if self.reference else None,
            "left_out": self.left_out,
            "warnings": list(self.warnings),
        }
