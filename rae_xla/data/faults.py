"""Samples that cannot be used: what stands in for them, how many there may be, where it is told.

A sample is bad when its bytes cannot be had (a shard is gone, cut short or overwritten, a bucket
does not answer), are not those that were indexed, or do not decode. Another sample takes its row,
so shapes and order stay what they are, and which one is a function of seed, epoch and sample.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rae_xla.data.counter import Purpose, counter_hash
from rae_xla.errors import UserError

MOST_REPLACEMENTS = 8
"""So many replacements in a row are bad only where nothing can be read at all."""

MOST_UNREACHABLE = 3
"""So many samples in a row that a bucket does not give, each asked for a minute: it is gone."""

SHOWN = 8
"""Bad samples that an error lists; the file has them all."""


class SampleError(UserError):
    """A sample that cannot be used: ``reason`` names its shard and says why; ``unreachable`` is one
    that nobody has seen, and that may be all right.
    """

    def __init__(self, reason: str, remedy: str, *, unreachable: bool = False) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.unreachable = reason, unreachable


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced: when, its number, shard and place there, why, and by which."""

    step: int
    epoch: int
    sample: int
    shard: str
    offset: int
    reason: str
    replaced_by: int

    def __str__(self) -> str:
        return f"{self.reason}; sample {self.replaced_by} stands in for it"


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The sample that stands in for a bad one, or, from attempt 1 on, for one that is bad too."""
    word = counter_hash(seed, Purpose.REPLACEMENT, epoch, sample, attempt)
    return int(word[0] % num_samples)


def _step(line: str) -> float:
    """The step that a line of the file is of; past all of them if a kill cut it short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def say_on_stderr(line: str) -> None:
    """Where bad samples are told unless told elsewhere."""
    print(line, file=sys.stderr)


class BadSamples:
    """Counts the bad samples of one process, tells each, and ends a run that has too many.

    Attributes:
        count: how many there have been.

    Args:
        file: gets a line of JSON for every one; None: none is written.
        start: the step that a run goes on with; what ``file`` says of later ones is dropped.
        max_fraction: of the samples read, or of an epoch's while that is more, may be bad.
        per_epoch: how many samples this process reads in an epoch.
        say: takes a line for people.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        start: int = 0,
        max_fraction: float = 0.001,
        per_epoch: int = 0,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self.count = 0
        self.say, self._file = say, file
        self._max_fraction, self._per_epoch = max_fraction, per_epoch
        self._read = 0
        self._first: list[BadSample] = []
        if file is not None and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) < start]
            file.write_text("".join(kept), encoding="utf-8")

    def take(self, samples: int, bad: Sequence[BadSample]) -> None:
        """Record what a step read.

        Args:
            samples: how many rows it made.
            bad: the samples that were replaced on the way.

        Raises:
            UserError: there are more than the limit; the first of them are listed.
        """
        self._read += samples
        if not bad:
            return
        self.count += len(bad)
        self._first += bad[: SHOWN - len(self._first)]
        for sample in bad:
            self.say(f"bad sample: {sample}")
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
        if self.count > self._max_fraction * max(self._read, self._per_epoch):
            self._stop()

    def _stop(self) -> None:
        more = f"; and {self.count - len(self._first)} more" if self.count > SHOWN else ""
        where = f" (all of them: {self._file})" if self._file is not None else ""
        plural = "s" if self.count > 1 else ""
        raise UserError(
            f"{self.count} bad sample{plural} among {self._read} read, more than "
            f"data.max_bad_samples = {self._max_fraction:g} allows: "
            + "; ".join(sample.reason for sample in self._first)
            + f"{more}{where}. Mend the shards (`rae-xla shards verify` finds every fault) and "
            "start the run again, or raise data.max_bad_samples"
        )
