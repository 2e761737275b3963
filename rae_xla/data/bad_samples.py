"""Bad samples: which sample replaces one, and how many a run may have.

A sample is bad if its bytes cannot be read (its shard is missing, truncated or overwritten, or a
bucket does not respond), differ from those that were indexed, or do not decode. Another sample
takes its row, chosen by seed, epoch and sample, so shapes and order stay the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rae_xla.data.counter_rng import Purpose, counter_hash
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 8
"""Replacements of one sample: if all of them are bad, nothing can be read."""

MAX_UNREACHABLE = 3
"""Samples in a row that a bucket does not deliver, each tried for a minute, before a run ends."""

MAX_LISTED = 8
"""Bad samples that an error message lists; the file has all of them."""


class SampleError(UserError):
    """A sample cannot be used.

    Args:
        reason: names the shard and the fault.
        remedy: what the user can do.
        unreachable: the sample could not be read, so it may be intact.
    """

    def __init__(self, reason: str, remedy: str, *, unreachable: bool = False) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.unreachable = reason, unreachable


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced in a batch.

    Attributes:
        step: of the batch.
        epoch: of the batch.
        sample: number of the bad sample.
        shard: path of its shard.
        offset: offset of its image in the shard, in bytes.
        reason: what is wrong with it.
        replaced_by: number of the sample in its row.
    """

    step: int
    epoch: int
    sample: int
    shard: str
    offset: int
    reason: str
    replaced_by: int

    def __str__(self) -> str:
        return f"{self.reason}; replaced by sample {self.replaced_by}"


def replacement(seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """Return the sample that replaces a bad one; ``attempt`` counts earlier bad replacements."""
    bits = counter_hash(seed, Purpose.REPLACEMENT, epoch, sample, attempt)
    return int(bits[0] % num_samples)


class BadSampleLog:
    """Counts, logs and records the bad samples of one process, and ends a run with too many.

    Attributes:
        count: number of bad samples so far.

    Args:
        file: JSON Lines file that gets a line for each; None: no file.
        start: first step of this run; lines of ``file`` for this and later steps are removed.
        max_fraction: how many of the samples read (or of the samples of an epoch, while that is
            more) may be bad.
        per_epoch: number of samples that this process reads in an epoch.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        start: int = 0,
        max_fraction: float = 0.001,
        per_epoch: int = 0,
    ) -> None:
        self.count = 0
        self._file = file
        self._max_fraction, self._per_epoch = max_fraction, per_epoch
        self._read = 0
        self._first: list[BadSample] = []
        if file is not None and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) < start]
            file.write_text("".join(kept), encoding="utf-8")

    def record(self, samples: int, bad: Sequence[BadSample]) -> None:
        """Record one step.

        Args:
            samples: number of rows that this process built.
            bad: the samples that were replaced in them.

        Raises:
            UserError: there are more bad samples than allowed; the message lists the first ones.
        """
        self._read += samples
        if not bad:
            return
        self.count += len(bad)
        self._first += bad[: MAX_LISTED - len(self._first)]
        for sample in bad:
            logger.warning("bad sample: %s", sample)
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(sample)) + "\n" for sample in bad)
        if self.count > self._max_fraction * max(self._read, self._per_epoch):
            raise UserError(self._too_many())

    def _too_many(self) -> str:
        more = f"; and {self.count - len(self._first)} more" if self.count > MAX_LISTED else ""
        where = f" (all of them: {self._file})" if self._file is not None else ""
        plural = "s" if self.count > 1 else ""
        return (
            f"{self.count} bad sample{plural} among {self._read} read, more than "
            f"data.max_bad_samples = {self._max_fraction:g} allows: "
            + "; ".join(sample.reason for sample in self._first)
            + f"{more}{where}. Repair the shards (`rae-xla shards verify` finds every fault) and "
            "start the run again, or raise data.max_bad_samples"
        )


def _step_of(line: str) -> float:
    """Return the step of a line of the file; infinity if a kill truncated the line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
