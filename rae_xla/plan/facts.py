"""What the compiler made of a step: read from its figures and from the text of what it compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rae_xla.plan.collectives import BETWEEN_SLICES, Collective, faults, find_collectives
from rae_xla.plan.compile import Compiled
from rae_xla.plan.hlo import parse_module
from rae_xla.plan.liveness import Peak, peak_memory
from rae_xla.plan.trace import Argument
from rae_xla.plan.traffic import Traffic, memory_traffic
from rae_xla.runtime.stacked import names_in

KINDS = ("parameters", "optimizer", "ema", "frozen", "batch", "constants")


@dataclass(frozen=True)
class Facts:
    """A compiled step, for one chip.

    Attributes:
        compiled: sizes and seconds.
        arguments: bytes of the step's inputs by kind (``KINDS``), without padding.
        held: bytes the run holds besides, which this step does not use.
        flops: of one step over all chips, recomputation included.
        phase, mesh: for people.
        peak: what fills the temporaries; None if it could not be compiled.
        collectives: what is sent, largest first.
        faults: what an FSDP step should not send.
        traffic: what moves in memory, largest first.
        unknown_loops: loops whose length the text does not tell; they count once.
    """

    compiled: Compiled
    arguments: dict[str, int]
    held: int
    flops: float
    phase: str
    mesh: str
    peak: Peak | None = None
    collectives: list[Collective] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)

    @property
    def sent(self) -> float:
        """Bytes a chip sends to others of its slice in a step."""
        return sum(c.sent for c in self.collectives if c.kind != BETWEEN_SLICES)

    @property
    def sent_between_slices(self) -> float:
        """Bytes a chip hands to its host for the other slices in a step."""
        return sum(c.sent for c in self.collectives if c.kind == BETWEEN_SLICES)

    @property
    def moved(self) -> float:
        """Bytes a chip reads from and writes to its memory in a step."""
        return float(sum(row.num_bytes for row in self.traffic))

    @property
    def hbm(self) -> float:
        """Bytes in use at once, with what is held besides."""
        return self.compiled.hbm + self.held


def read_facts(
    compiled: Compiled, traced: Mapping[str, Any], text: Path, *, chips: int, rows: int, bf16: bool
) -> Facts:
    """Everything a compiled step tells.

    Args:
        compiled: the compiler's figures.
        traced: of the traced step (``trace.Traced`` as a dict).
        text: the compiled module's file; not looked at if it could not be compiled.
        chips: of the topology.
        rows: images of a step on one chip.
        bf16: whether the run computes in bf16.
    """
    arguments = [Argument(**argument) for argument in traced["arguments"]]
    facts = Facts(
        compiled=compiled,
        arguments={k: sum(a.num_bytes for a in arguments if a.kind == k) for k in KINDS},
        held=traced["held"],
        flops=traced["flops"],
        phase=traced["phase"],
        mesh=traced["mesh"],
    )
    if not compiled.fits:
        return facts
    module = parse_module(text.read_text())
    collectives = find_collectives(module, chips)
    known = [a for a in arguments if a.kind in ("parameters", "frozen")]
    weights = [tuple(a.shape) for a in known]
    weights += [tuple(a.shape[1:]) for a in known if len(names_in(a.name)) > 1]  # as a loop has it
    return replace(
        facts,
        peak=peak_memory(module, weights, max(a.shards for a in arguments), rows),
        collectives=collectives,
        faults=faults(collectives, weights) if bf16 else [],
        traffic=memory_traffic(module),
        unknown_loops=module.unknown_loops,
    )
