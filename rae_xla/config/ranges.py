"""Ranges of numbers: part of the schema of every numeric key."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_INTEGER = 2**31 - 1
"""Upper bound of the integers without one of their own: steps and counts are int32 on devices."""

LARGEST_SEED = 2**63 - 1
"""Upper bound of seeds."""

LONGEST_WAIT = 1e7
"""Seconds, about four months: the timers of the operating system overflow far above this."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key accepts. NaN and infinity are in no range.

    Attributes:
        least: smallest number.
        above: bound below the numbers, itself excluded.
        most: largest number.
        below: bound above the numbers, itself excluded.
        odd: whether even numbers are excluded.
        also: one number outside of the bounds, which has a meaning of its own.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    odd: bool = False
    also: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether the key accepts ``value``."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, int) and abs(value) > LARGEST_SEED:  # no tensor holds it
            return False
        if self.also is not None and value == self.also:
            return True
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and not (self.odd and value % 2 == 0)
        )

    def describe(self, value: float = 0) -> str:
        """Return the range in words, such as ``a number of at least 0 and below 1``.

        Args:
            value: a number outside of the range. The bound that all integers share is left out
                unless it is the one that excludes this number.
        """
        shared = self.most in (LARGEST_INTEGER, LARGEST_SEED) and not value > self.most
        bounds = [
            f"{words} {_text(bound)}"
            for words, bound in (
                ("of at least", self.least),
                ("above", self.above),
                ("at most", None if shared else self.most),
                ("below", self.below),
            )
            if bound is not None
        ]
        kind = "an odd number" if self.odd else "a number"
        also = "" if self.also is None else f", or {self.also:g}"
        return f"{kind} {' and '.join(bounds)}{also}" if bounds else "a finite number"

    def symbols(self) -> str:
        """Return the range for a table, such as ``>= 0, < 1``."""
        most = None if self.most in (LARGEST_INTEGER, LARGEST_SEED) else self.most
        bounds = [
            f"{symbol} {_text(bound)}"
            for symbol, bound in (
                (">=", self.least),
                (">", self.above),
                ("<=", most),
                ("<", self.below),
            )
            if bound is not None
        ]
        odd = ["odd"] if self.odd else []
        also = "" if self.also is None else f"; or {self.also:g}"
        return (", ".join([*bounds, *odd]) or "finite") + also


def _text(bound: float) -> str:
    """Return a bound in words; integers in full."""
    return str(bound) if isinstance(bound, int) else f"{bound:.12g}"


COUNT = Range(least=1, most=LARGEST_INTEGER)
COUNT_OR_ZERO = Range(least=0, most=LARGEST_INTEGER)
SEED = Range(least=0, most=LARGEST_SEED)
FINITE = Range()
POSITIVE = Range(above=0)
FRACTION = Range(least=0, most=1)
FRACTION_BELOW_ONE = Range(least=0, below=1)
EPSILON = Range(above=0, most=1)
LEARNING_RATE = Range(least=0, most=10)
AVERAGE_WIDTH = Range(least=0.005, most=0.28)
EPOCHS = Range(least=0, most=1e6)
LOSS_WEIGHT = Range(least=0, most=1e6)
SECONDS = Range(least=0, most=LONGEST_WAIT)
CFG_SCALE = Range(least=1, most=1000)
GRID_POINTS = Range(least=2, most=LARGEST_INTEGER)
MESH_AXIS = Range(least=1, most=LARGEST_INTEGER, also=-1)
