"""Forecasts of a run on several clusters of GPUs, with one or several settings."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rae_xla.config import RunConfig
from rae_xla.tools.plan.arithmetic import count_model
from rae_xla.tools.plan.forecast import IMAGENET_IMAGES
from rae_xla.tools.plan.gpu.cards import Cluster
from rae_xla.tools.plan.gpu.count import CountJob
from rae_xla.tools.plan.gpu.forecast import (
    GpuCase,
    GpuForecast,
    make_gpu_case,
    make_gpu_forecast,
)
from rae_xla.tools.plan.gpu.step_count import StepCount
from rae_xla.tools.plan.networks import without_weights
from rae_xla.tools.plan.worker import Limits, run_module
from rae_xla.train.cadence import make_cadence

logger = logging.getLogger(__name__)

_LOG_INTERVAL = 30.0
"""Seconds between two log lines of a process that is running."""

VARIANTS: tuple[tuple[bool, float], ...] = ((False, 0.0), (True, 0.0), (False, 1.0), (True, 1.0))
"""``runtime.compile`` and ``runtime.remat`` of the rows of a sweep."""


@dataclass(frozen=True)
class GpuPlanRequest:
    """The run to plan, and how.

    Attributes:
        config: of the run.
        task: ``stage1`` or ``stage2``.
        images: images per epoch.
        price: of one GPU for one hour, if known.
        limits: of the processes that count.
        variants: whether to plan the run with each of ``VARIANTS`` instead of its own settings.
    """

    config: RunConfig
    task: str
    images: int = IMAGENET_IMAGES
    price: float | None = None
    limits: Limits = field(default_factory=lambda: Limits(math.inf, math.inf))
    variants: bool = False


def make_gpu_forecasts(
    request: GpuPlanRequest, clusters: Sequence[Cluster], batches: Iterable[int | None]
) -> Iterator[GpuForecast]:
    """Yield a forecast for each cluster, batch size and setting, as soon as it is finished.

    Args:
        request: the run to plan.
        clusters: of GPUs.
        batches: images per step; None for the configured number.

    Raises:
        UserError: if the configuration is invalid, or does not fit a cluster.
    """
    with TemporaryDirectory(prefix="rae-xla-plan-") as name:
        folder = Path(name)
        config, notes = without_weights(request.config, folder / "encoder")
        configs = [config]
        if request.variants:
            configs = [_with_runtime(config, *variant) for variant in VARIANTS]
        cases = [
            make_gpu_case(each, cluster, batch)
            for batch in batches
            for cluster in clusters
            for each in configs
        ]
        logger.info("plan: counting parameters and FLOPs")
        model_counts = count_model(config, request.task)
        counter = _Counter(request, folder)
        for case in cases:
            cadence = make_cadence(case.config, max(1, request.images // case.batch), case.batch)
            yield make_gpu_forecast(
                case, model_counts, counter.count(case), cadence.total, request.price, notes
            )


def _with_runtime(config: RunConfig, compiled: bool, remat: float) -> RunConfig:
    return replace(config, runtime=replace(config.runtime, compile=compiled, remat=remat))


@dataclass
class _Counter:
    """Counts steps; clusters with the same number of GPUs share a count."""

    request: GpuPlanRequest
    folder: Path
    counted: dict[tuple[int, str], list[StepCount]] = field(default_factory=dict)

    def count(self, case: GpuCase) -> list[StepCount]:
        path = self.folder / f"run-{len(self.counted)}"
        config_file = path.with_suffix(".yaml")
        case.config.save(config_file)
        key = case.cluster.gpus, config_file.read_text()
        if key not in self.counted:
            gpus, rows = case.cluster.gpus, case.rows_to_count
            job = CountJob(str(config_file), self.request.task, gpus, rows, str(path))
            self._run(job, path, f"counting the step on {gpus} GPUs: {case.settings}")
            content = json.loads(path.with_suffix(".json").read_text())
            self.counted[key] = [StepCount.from_json(count) for count in content]
        return self.counted[key]

    def _run(self, job: CountJob, path: Path, activity: str) -> None:
        job_file = path.with_suffix(".job")
        job_file.write_text(json.dumps(asdict(job)))
        logger.info("plan: %s", activity)
        last_logged = 0.0

        def log_progress(seconds: float, memory: float) -> None:
            nonlocal last_logged
            if seconds >= last_logged + _LOG_INTERVAL:
                last_logged = seconds
                logger.info("plan: %s: %.0f s, %.1f GB", activity, seconds, memory / 1e9)

        # Nothing is computed; a GPU of this machine stays free for others.
        environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        module = "rae_xla.tools.plan.gpu.count"
        run_module(module, str(job_file), self.request.limits, environment, log_progress)
