"""Compare the host time to trace one AdamW step on XLA for torch.optim and rae_xla.

    python benchmarks/optimizer_trace.py [--parameters 90]

The timed part only traces: it is the work of the host that delays the next step of a TPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from rae_xla.runtime import start
from rae_xla.train.optimizers import AdamW

ROUNDS = 10


def record(step: Callable[[], None]) -> float:
    """Return the median time of this thread to trace one step, in milliseconds."""
    import torch_xla

    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time()
        step()
        times.append(time.thread_time() - begin)
        torch_xla.sync()
    return 1e3 * sorted(times)[ROUNDS // 2]


def main() -> None:
    """Time both optimizers and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=90)
    count = parser.parse_args().parameters
    settings = SimpleNamespace(
        backend="xla", precision="fp32", compile=False, compile_cache=None, devices=1
    )
    device = start(settings, SimpleNamespace(data=1, fsdp=1)).device

    def tensors() -> list[Tensor]:
        return [torch.full((64, 64), 0.1, device=device) for _ in range(count)]

    parameters = [torch.nn.Parameter(t) for t in tensors()]
    for parameter, gradient in zip(parameters, tensors(), strict=True):
        parameter.grad = gradient
    theirs = torch.optim.AdamW(parameters, capturable=True, foreach=False)
    theirs.param_groups[0]["lr"] = torch.tensor(1e-3).to(device)
    theirs.step()  # makes its state
    old = record(theirs.step)

    ours, lr, step = AdamW((0.9, 0.95), 1e-8, 0.0), torch.tensor(1e-3).to(device), torch.tensor(3)
    lists = [tensors() for _ in range(4)]
    always = torch.tensor(True).to(device)
    new = record(lambda: ours.update(*lists, lr, step.to(device), always))
    print(f"{count} parameters, ms to trace a step")
    print(f"{'torch.optim.AdamW (capturable)':<32}{old:>8.1f}{1.0:>8.2f}")
    print(f"{'rae_xla.train.optimizers':<32}{new:>8.1f}{new / old:>8.2f}")


if __name__ == "__main__":
    main()
