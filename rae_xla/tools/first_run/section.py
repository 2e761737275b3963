"""One section of a first run: ``python -m rae_xla.tools.first_run.section JOB.json``.

Every section is a process of its own (or several, under torchrun), so that one that fails or takes
too long does not end the others. Process 0 writes the result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rae_xla.config import RunConfig, load_config
from rae_xla.progress import configure_logging, log_only_on_first_process
from rae_xla.runtime import Backend, start
from rae_xla.tools.first_run import parity, planned, resume, sampling, steps
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.tools.plan.worker import end_with_parent


@dataclass(frozen=True)
class SectionJob:
    """Input of a section's process.

    Attributes:
        name: key of ``SECTIONS``.
        run: fields of the ``FirstRun``.
        out: file of the result.
        options: arguments of the section.
    """

    name: str
    run: dict[str, Any]
    out: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a section found, and whether this process writes it."""

    content: dict[str, Any]
    is_first: bool = True


def _devices(run: FirstRun) -> Result:
    backend = _start(load_config(run.tiny_model, overrides=parity.overrides(run)))
    accelerator, memory = backend.accelerator(), backend.memory()
    content = {
        "description": backend.description,
        "backend": backend.name,
        "on_cpu": backend.on_cpu,
        "count": backend.mesh.size,
        "accelerator": None if accelerator is None else accelerator.name,
        "total_bytes": None if memory is None else memory.total,
    }
    return Result(content, backend.process_index == 0)


def _parity(run: FirstRun, precision: str) -> Result:
    settings = [*parity.overrides(run), f"runtime.precision={precision}"]
    backend = _start(load_config(run.tiny_model, overrides=settings))
    return Result(parity.compare(run, precision, backend), backend.process_index == 0)


def _plan_gpus(run: FirstRun, task: str, name: str, gpus: int) -> Result:
    return Result(planned.plan_for_gpus(run, task, name, gpus))


def _plan_tpus(run: FirstRun, task: str, name: str, chips: int) -> Result:
    return Result(planned.plan_for_tpus(run, task, name, chips))


def _steps(run: FirstRun, task: str, rows: int) -> Result:
    file, settings = run.task_config(task)
    backend = _start(load_config(file, overrides=settings))
    return Result(steps.measure_step(run, task, rows, backend), backend.process_index == 0)


def _sampling(run: FirstRun, rows: int) -> Result:
    file, settings = run.task_config("stage2")
    backend = _start(load_config(file, overrides=settings))
    return Result(sampling.measure_sampling(run, rows, backend), backend.process_index == 0)


def _resume(run: FirstRun, command: list[str]) -> Result:
    return Result(resume.save_and_resume(run, command))


SECTIONS: dict[str, Callable[..., Result]] = {
    "devices": _devices,
    "parity": _parity,
    "plan_gpus": _plan_gpus,
    "plan_tpus": _plan_tpus,
    "steps": _steps,
    "sampling": _sampling,
    "resume": _resume,
}


def _start(config: RunConfig) -> Backend:
    backend = start(config.runtime, config.mesh, seed=config.training.global_seed)
    log_only_on_first_process(backend.process_index)
    return backend


def main(path: str) -> None:
    """Run the section that the job file describes, and write its result."""
    end_with_parent()
    configure_logging()
    job = SectionJob(**json.loads(Path(path).read_text()))
    result = SECTIONS[job.name](FirstRun(**job.run), **job.options)
    if result.is_first:
        Path(job.out).write_text(json.dumps(result.content))


if __name__ == "__main__":
    main(sys.argv[1])
