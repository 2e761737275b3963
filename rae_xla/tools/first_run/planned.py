"""Section ``plan``: what ``rae-xla plan`` says about the steps that are measured next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rae_xla.runtime.accelerators import Accelerator, known_accelerator
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.tools.first_run.steps import step_config
from rae_xla.tools.plan.gpu.cards import CARDS, GIB, Card, Cluster
from rae_xla.tools.plan.gpu.planner import GpuPlanRequest, make_gpu_forecasts
from rae_xla.tools.plan.planner import PlanRequest, make_forecasts
from rae_xla.tools.plan.tpus import TPU_GENERATIONS, parse_topology

MOST_ROWS = 128
"""Images per device at most, so that a step takes seconds."""

ROWS_WITHOUT_PLAN = {"stage1": 8, "stage2": 16}
"""Images per device on devices for which no plan predicts the memory."""

SMOKE_ROWS = 4

_HEADROOM = 0.9  # of the largest batch that the plan says fits


def plan_for_gpus(run: FirstRun, task: str, name: str, gpus: int) -> dict[str, Any]:
    """Return the planned memory and time of a task's step on GPUs, and the batch to measure.

    Args:
        run: the first run.
        task: ``stage1`` or ``stage2``.
        name: of the GPU, from its driver; an unknown one is planned like a 4090.
        gpus: number of them.
    """
    card = card_of(known_accelerator(name))
    rows = SMOKE_ROWS if run.smoke else 32
    config = step_config(run, task, rows * gpus)
    request = GpuPlanRequest(config=config, task=task)
    [forecast] = make_gpu_forecasts(request, [Cluster(card, gpus)], [None])
    chosen = rows if run.smoke else min(MOST_ROWS, int(_HEADROOM * forecast.largest_rows))
    scale = chosen / rows
    return {
        "rows": max(1, chosen),
        "card": card.name,
        "settings": forecast.case.settings,
        "peak_bytes": forecast.memory.fixed + forecast.memory.per_image * chosen,
        "largest_rows": forecast.largest_rows,
        "step_s": [scale * forecast.fast.step, scale * forecast.slow.step],
    }


def card_of(accelerator: Accelerator | None) -> Card:
    """Return the specifications of a known GPU, or those of the smallest usual one."""
    for card in CARDS.values():
        if accelerator is not None and known_accelerator(card.driver_name) == accelerator:
            return card
    if accelerator is None:
        return CARDS["4090"]
    return replace(CARDS["4090"], memory_bytes=0.93 * accelerator.hbm_bytes // GIB * GIB)


def plan_for_tpus(run: FirstRun, task: str, name: str, chips: int) -> dict[str, Any]:
    """Return the bound of a step's time on TPUs, from counts, and the batch to measure.

    Args:
        run: the first run.
        task: ``stage1`` or ``stage2``.
        name: of the accelerator, such as ``TPU v5e``.
        chips: number of chips.
    """
    rows = ROWS_WITHOUT_PLAN[task]
    generation = TPU_GENERATIONS[name.removeprefix("TPU ")]
    count = chips * (2 if generation.cores_in_name else 1)
    topology = parse_topology(f"{generation.gcloud}-{count}")
    request = PlanRequest(step_config(run, task, rows * chips), task, compile_step=False)
    [forecast] = make_forecasts(request, [topology], [None])
    return {
        "rows": rows,
        "topology": topology.accelerator,
        "state_bytes": forecast.state_bytes,
        "step_s": [forecast.roofline.step, None],
    }
