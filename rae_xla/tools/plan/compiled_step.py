"""Analysis of a compiled step: the compiler's numbers, and properties of the compiled module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rae_xla.runtime.blocks import unstacked_names
from rae_xla.tools.plan.collectives import (
    BETWEEN_SLICES,
    Collective,
    find_collectives,
    find_faults,
)
from rae_xla.tools.plan.compile import CompileResult
from rae_xla.tools.plan.hlo import parse_module
from rae_xla.tools.plan.liveness import PeakMemory, peak_memory
from rae_xla.tools.plan.trace import Argument
from rae_xla.tools.plan.traffic import Traffic, memory_traffic

KINDS = ("parameters", "optimizer", "ema", "frozen", "batch", "constants")


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step, seen from one chip.

    Attributes:
        result: sizes and compile time, as the compiler reports them.
        arguments: bytes of the step's inputs by kind (``KINDS``), without padding.
        idle_bytes: bytes that the run keeps on the chip but this step does not use.
        flops: of one step over all chips, recomputation included.
        phase: phase of the run that the step belongs to.
        mesh: description of the device mesh.
        peak: contents of the temporaries at the peak; None if compilation failed.
        collectives: by descending bytes sent.
        faults: collectives that an FSDP step should not have.
        traffic: HBM traffic by operation, descending.
        unknown_loops: loops whose trip count is unknown; they count once.
    """

    result: CompileResult
    arguments: dict[str, int]
    idle_bytes: int
    flops: float
    phase: str
    mesh: str
    peak: PeakMemory | None = None
    collectives: list[Collective] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)

    @property
    def bytes_sent(self) -> float:
        """Bytes that a chip sends within its slice per step."""
        return sum(c.bytes_sent for c in self.collectives if c.kind != BETWEEN_SLICES)

    @property
    def bytes_sent_between_slices(self) -> float:
        """Bytes that a chip sends to other slices per step, through its host."""
        return sum(c.bytes_sent for c in self.collectives if c.kind == BETWEEN_SLICES)

    @property
    def hbm_traffic(self) -> float:
        """Bytes that a chip reads from and writes to HBM per step, by our estimate."""
        return float(sum(row.num_bytes for row in self.traffic))

    @property
    def hbm_bytes(self) -> float:
        """Peak bytes in use on a chip, idle ones included."""
        return self.result.hbm_bytes + self.idle_bytes


def analyse_step(
    result: CompileResult,
    traced: Mapping[str, Any],
    hlo_file: Path,
    *,
    chips: int,
    rows: int,
    bf16: bool,
) -> CompiledStep:
    """Analyse a compiled step.

    Args:
        result: of the compiler.
        traced: the traced step (``trace.TracedStep`` as a dict).
        hlo_file: text of the compiled module; not read if compilation failed.
        chips: number of chips of the topology.
        rows: images per chip and step.
        bf16: whether the run computes in bf16.
    """
    arguments = [Argument(**argument) for argument in traced["arguments"]]
    step = CompiledStep(
        result=result,
        arguments={k: sum(a.num_bytes for a in arguments if a.kind == k) for k in KINDS},
        idle_bytes=traced["idle_bytes"],
        flops=traced["flops"],
        phase=traced["phase"],
        mesh=traced["mesh"],
    )
    if not result.succeeded:
        return step
    module = parse_module(hlo_file.read_text())
    collectives = find_collectives(module, chips)
    known = [a for a in arguments if a.kind in ("parameters", "frozen")]
    weights = [tuple(a.shape) for a in known]
    # A loop over stacked blocks uses one block's part of a stacked parameter.
    weights += [tuple(a.shape[1:]) for a in known if len(unstacked_names(a.name)) > 1]
    return replace(
        step,
        peak=peak_memory(module, weights, max(a.shards for a in arguments), rows),
        collectives=collectives,
        faults=find_faults(collectives, weights) if bf16 else [],
        traffic=memory_traffic(module),
        unknown_loops=module.unknown_loops,
    )
