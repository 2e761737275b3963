"""A train step with real weights on real processes, counted as ``rae-xla plan --gpus`` counts it.

``python counted_step.py CONFIG TASK PROCESSES ROWS OUT [key=value ...]`` forks the processes and
writes the count of process 0; ``tools/plan/gpu/test_gpu_count.py`` compares it with that of fake
tensors.
"""

import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from rae_xla import load_config
from rae_xla.runtime import start
from rae_xla.tools.plan.gpu.count import count_built_step
from rae_xla.tools.plan.gpu.step_count import StepCount
from rae_xla.tools.plan.trace import build_task


def count_real_step(file: Path, task_name: str, rows: int, overrides: list[str]) -> StepCount:
    config = load_config(file, overrides=overrides)
    backend = start(config.runtime, config.mesh)
    return count_built_step(build_task(config, task_name, backend), backend, rows)


def main(file: str, task: str, count: str, rows: str, out: str, *overrides: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = []
    for rank in range(int(count)):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            found = count_real_step(Path(file), task, int(rows), list(overrides))
            if rank == 0:
                Path(out).write_text(json.dumps(asdict(found)))
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
