"""Memory of the runs that docs/gpu.md documents, counted without a GPU.

    python benchmarks/gpu_memory.py [ROWS ...]

Prints rows for the table in docs/gpu.md. ``ROWS`` selects some by a part of their text, such as
``ditdh_s`` or ``8xh100``. Each row is what ``rae-xla plan --gpus`` counts with its settings; the
exit status is 1 if one of them does not fit. Counting a row takes minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from rae_xla import load_config
from rae_xla.tools.plan.gpu.cards import GIB, parse_gpus
from rae_xla.tools.plan.gpu.count import count_step
from rae_xla.tools.plan.gpu.forecast import GpuCase, make_gpu_case
from rae_xla.tools.plan.gpu.step_count import StepCount
from rae_xla.tools.plan.networks import without_weights

S_256, S_512 = "configs/stage2/ditdh_s_256.yaml", "configs/stage2/ditdh_s_512.yaml"
XL_256, XL_512 = "configs/stage2/ditdh_xl_256.yaml", "configs/stage2/ditdh_xl_512.yaml"
STAGE_1 = "configs/stage1/dinov2_b_256.yaml"

# A card of 24 GB, one of 80 GB, and eight of these: configuration, GPUs, remat, micro-batches.
RUNS = (
    (S_256, "1x4090", 0, 16),
    (S_256, "1xh100", 0, 4),
    (S_256, "8xh100", 0, 1),
    (S_512, "1x4090", 0, 64),
    (S_512, "1xh100", 0, 16),
    (S_512, "8xh100", 0, 2),
    (XL_256, "1x4090", 1, 64),
    (XL_256, "1xh100", 1, 4),
    (XL_256, "8xh100", 0, 2),
    (XL_512, "1x4090", 1, 512),
    (XL_512, "1xh100", 1, 16),
    (XL_512, "8xh100", 1, 4),
    (STAGE_1, "1x4090", 1, 32),
    (STAGE_1, "1xh100", 1, 8),
    (STAGE_1, "8xh100", 1, 1),
)


def settings_of(remat: int, micro_batches: int) -> list[str]:
    """Return the settings of a row that are not in its configuration."""
    accumulation = [f"training.grad_accum_steps={micro_batches}"] if micro_batches > 1 else []
    return ["runtime.precision=bf16", *(["runtime.remat=1"] if remat else []), *accumulation]


def count(config: str, gpus: str, settings: list[str]) -> tuple[GpuCase, StepCount]:
    """Return one run on its GPUs, and the count of its step."""
    task = "stage1" if config == STAGE_1 else "stage2"
    with TemporaryDirectory() as folder:
        run, _ = without_weights(load_config(config, settings), Path(folder) / "encoder")
        case = make_gpu_case(run, parse_gpus(gpus))
        return case, count_step(case.config, task, case.cluster.gpus, case.rows)


def rows(selected: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield the rows, and whether they fit."""
    for config, gpus, remat, micro_batches in RUNS:
        settings = settings_of(remat, micro_batches)
        start = f"| `{config}` | `{gpus}` | `{' '.join(settings)}` |"
        if all(part not in start for part in selected or [""]):
            continue
        case, found = count(config, gpus, settings)
        fits = found.peak <= case.cluster.card.usable_bytes
        yield f"{start} {case.rows} x {micro_batches} | {found.peak / GIB:.1f} |", fits


if __name__ == "__main__":
    fitting = []
    for row, fits in rows(sys.argv[1:]):
        print(row if fits else f"{row} DOES NOT FIT", flush=True)
        fitting.append(fits)
    sys.exit(not all(fitting))
