"""Host time of a step: what the host needs to replay a program, measured on this machine.

Replaying costs time for every input and output of the program, whatever it computes. So a stand-in
with the inputs and outputs of the step is replayed, on as many virtual CPU devices as a TPU host
has chips. Tracing is measured where the step is traced (``trace.TracedStep.host_seconds``).

It runs as a separate process (``python -m rae_xla.tools.plan.host JOB.json``), because the number
of devices is fixed when torch_xla starts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.tools.plan.worker import end_with_parent

ROUNDS = 15
"""Replays that are measured."""


@dataclass(frozen=True)
class HostJob:
    """Input of the measuring process.

    Attributes:
        inputs: number of inputs of the program.
        updated: number of those that it updates in place.
        devices: chips of one host.
        out: path of the result, without a suffix.
    """

    inputs: int
    updated: int
    devices: int
    out: str


@dataclass(frozen=True)
class HostTime:
    """Seconds of processor time that the main thread of a host needs for one step.

    Attributes:
        traced: to trace the step in Python and to launch it, as with ``runtime.replay=false``.
        replayed: to launch its compiled program.
    """

    traced: float
    replayed: float


def replay_seconds(job: HostJob) -> float:
    """Return the median processor time of the main thread for one replay, in seconds."""
    from rae_xla.runtime import start

    backend = start(RuntimeConfig(backend="xla", devices=job.devices), MeshConfig())
    rows = backend.mesh.batch_shards

    def place(count: int) -> list[Tensor]:
        return [backend.shard_batch({"x": torch.zeros(rows)})["x"] for _ in range(count)]

    updated, read = place(job.updated), place(max(1, job.inputs - job.updated - 1))

    def step(x: Tensor) -> Tensor:
        torch._foreach_add_(updated, [x] * len(updated))
        return x + sum(read)

    compiled, [x] = backend.compile(step), place(1)
    seconds = []
    for _ in range(2 + ROUNDS):
        backend.synchronize()
        begin = time.thread_time()
        compiled(x)
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds[2:])  # the first two calls trace


def main(path: str) -> None:
    """Run the job in a JSON file."""
    end_with_parent()
    job = HostJob(**json.loads(Path(path).read_text()))
    Path(job.out).with_suffix(".json").write_text(json.dumps({"seconds": replay_seconds(job)}))


if __name__ == "__main__":
    main(sys.argv[1])
