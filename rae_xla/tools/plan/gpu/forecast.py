"""Forecast of a run on GPUs: memory, the largest batch, communication, time and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rae_xla.config import RunConfig, split_batch
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.tools.plan.arithmetic import ModelCounts
from rae_xla.tools.plan.gpu.cards import Cluster
from rae_xla.tools.plan.gpu.step_count import StepCount
from rae_xla.tools.plan.gpu.timing import FAST, SLOW, StepTime, step_time

LARGE_ROWS = 32
"""Images per GPU from which activations exceed whatever else a step allocates for a moment."""


@dataclass(frozen=True)
class GpuCase:
    """One cluster, one batch size and the settings of the run.

    Attributes:
        cluster: the GPUs.
        config: of the run, with that batch.
        mesh: shape of the device mesh.
        batch: images per optimizer step.
        rows: images per GPU and micro-batch.
    """

    cluster: Cluster
    config: RunConfig
    mesh: MeshShape
    batch: int
    rows: int

    @property
    def settings(self) -> str:
        """The settings that determine memory and speed, as text."""
        runtime = self.config.runtime
        parts: list[str] = [runtime.precision]
        if runtime.compile:
            parts.append("compile")
        if runtime.remat:
            parts.append(f"remat={runtime.remat:g}")
        if (accumulate := self.config.training.grad_accum_steps) > 1:
            parts.append(f"grad_accum_steps={accumulate}")
        return ", ".join(parts)

    @property
    def rows_to_count(self) -> list[int]:
        """Images per GPU to count a step with: the configured number, and two large ones."""
        low = max(self.rows, LARGE_ROWS)
        return list(dict.fromkeys([self.rows, low, 2 * low]))

    def axis_of(self, ranks: Sequence[int]) -> str:
        """Return the name of the mesh axis that a group of processes spans."""
        if len(ranks) == self.cluster.gpus and self.mesh.fsdp < self.cluster.gpus:
            return "all" if self.mesh.fsdp > 1 else "data"
        return "fsdp" if list(ranks) == list(range(self.mesh.fsdp)) else "data"


def make_gpu_case(config: RunConfig, cluster: Cluster, batch: int | None = None) -> GpuCase:
    """Adapt a run to a cluster.

    Args:
        config: of the run.
        cluster: the GPUs.
        batch: images per step; None for the configured number.

    Raises:
        UserError: if the mesh or the batch does not fit the number of GPUs.
    """
    mesh = resolve_mesh(config.mesh, cluster.gpus)
    if batch is not None:
        training = replace(config.training, global_batch_size=batch, batch_size=None)
        config = replace(config, training=training)
    split = split_batch(config, mesh.batch_shards)
    return GpuCase(cluster, config, mesh, split.global_batch_size, split.per_device)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a GPU needs as a function of the images per micro-batch.

    Attributes:
        fixed: bytes that do not depend on the number of images.
        per_image: bytes for each image of a micro-batch.
    """

    fixed: float
    per_image: float

    @classmethod
    def from_counts(cls, counts: Sequence[StepCount]) -> MemoryModel:
        """Fit the model to the two counts with most images."""
        *_, small, large = sorted(counts, key=lambda count: count.rows)
        per_image = (large.peak - small.peak) / (large.rows - small.rows)
        return cls(large.peak - per_image * large.rows, per_image)

    def largest_rows(self, usable: float) -> int:
        """Return the largest number of images of a micro-batch that fits ``usable`` bytes."""
        return max(0, int((usable - self.fixed) // self.per_image))


@dataclass(frozen=True)
class GpuForecast:
    """Predicted memory, communication, time and cost of one case.

    Attributes:
        case: cluster, batch size and settings.
        model_counts: parameters and FLOPs of the run.
        count: of the step with the configured number of images.
        memory: as a function of the number of images.
        fast, slow: ends of the range of the step time.
        steps: number of steps of the run.
        price: of one GPU for one hour, if known.
        notes: assumptions, as sentences.
    """

    case: GpuCase
    model_counts: ModelCounts
    count: StepCount
    memory: MemoryModel
    fast: StepTime
    slow: StepTime
    steps: int
    price: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the step fits the memory of a GPU."""
        return self.count.peak <= self.case.cluster.card.usable_bytes

    @property
    def largest_rows(self) -> int:
        """Largest number of images per GPU and micro-batch that fits."""
        usable = self.case.cluster.card.usable_bytes
        if not self.fits and self.case.rows == 1:
            return 0
        return self.memory.largest_rows(usable)

    @property
    def accumulation(self) -> int | None:
        """Smallest ``grad_accum_steps`` with which the batch fits; None if there is none."""
        rows = self.case.batch // self.case.mesh.batch_shards
        fitting = range(1, min(rows, self.largest_rows) + 1)
        largest = max((n for n in fitting if rows % n == 0), default=None)
        return None if largest is None else rows // largest

    def utilisation(self, time: StepTime) -> float:
        """Return the model FLOP utilisation at a step time, without recomputation."""
        peak = self.case.cluster.card.peak_flops * self.case.cluster.gpus
        return self.model_counts.step * self.case.batch / peak / time.step

    def hours(self, time: StepTime) -> float:
        """Return the hours of the run at a step time."""
        return self.steps * time.step / 3600


def make_gpu_forecast(
    case: GpuCase,
    model_counts: ModelCounts,
    counts: Sequence[StepCount],
    steps: int,
    price: float | None = None,
    notes: Sequence[str] = (),
) -> GpuForecast:
    """Derive a forecast from counts of the step.

    Args:
        case: cluster, batch size and settings.
        model_counts: parameters and FLOPs of the run.
        counts: with the rows of ``case.rows_to_count``.
        steps: number of steps of the run.
        price: of one GPU for one hour.
        notes: assumptions, as sentences.
    """
    count = next(count for count in counts if count.rows == case.rows)
    runtime = case.config.runtime
    fast, slow = (
        step_time(
            count,
            case.cluster,
            assumed,
            bf16=runtime.precision == "bf16",
            compiled=runtime.compile,
        )
        for assumed in (FAST, SLOW)
    )
    memory = MemoryModel.from_counts(counts)
    return GpuForecast(case, model_counts, count, memory, fast, slow, steps, price, list(notes))
