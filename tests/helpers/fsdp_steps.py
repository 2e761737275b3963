"""What FSDP2 communicates and what is compiled in a step of two processes.

``python fsdp_steps.py FOLDER gathers|compiles`` forks the processes, each of which saves what it
counted as ``FOLDER/RANK.pt``; ``runtime/torch/test_fsdp.py`` examines it.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from distributed_steps import ROWS, build_discriminator, fork_processes, model_loss
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start

BLOCKS = (12, 2)
"""Blocks of each width; more than PyTorch compiles of one function by default."""


class Gathers(TorchDispatchMode):
    """Adds up the bytes of the results of all all-gathers, by dtype."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_allgather_base_":
            output = args[0]
            self.bytes[output.dtype] += output.numel() * output.element_size()
        return func(*args, **(kwargs or {}))


def build_model():
    torch.manual_seed(0)
    model = DiTDH(2, 1, 8, [32, 48], list(BLOCKS), [4, 4], num_classes=4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def rows_of(backend):
    return torch.arange(ROWS).chunk(backend.process_count)[backend.process_index]


def count_gathers(precision):
    """Return the gathered bytes of a step by dtype."""
    backend = start(RuntimeConfig(backend="torch", precision=precision), MeshConfig())
    model = backend.place(build_model())
    with Gathers() as gathers:
        with backend.autocast():
            loss = model_loss(model, rows_of(backend))
        loss.backward()
    return dict(gathers.bytes)


def count_discriminator_gathers():
    """Return the bytes that a discriminator in bf16 gathers, by dtype."""
    backend = start(RuntimeConfig(backend="torch", precision="bf16"), MeshConfig())
    disc = backend.place(build_discriminator())
    features = list(torch.randn(len(disc.heads), 4, 49, 32))
    with Gathers() as gathers, backend.autocast():
        disc.heads_forward(features)
    return dict(gathers.bytes)


def count_compiled(**settings):
    """Return how often compiled code ran in a forward pass, the graphs, and the gradients."""
    # Graphs are captured as ever, but run by PyTorch rather than as C++, which takes a minute to
    # compile; the tests of whole runs do that.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    backend = start(RuntimeConfig(backend="torch", **settings), MeshConfig())
    model = backend.place(build_model())
    loss = model_loss(model, rows_of(backend))  # compiles
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        loss = model_loss(model, rows_of(backend))
    loss.backward()
    runs = [e for e in recorded.events() if e.name.startswith("Torch-Compiled Region")]
    gradients = backend.global_gradients([p for p in model.parameters() if p.requires_grad])
    return {
        "runs": len(runs),
        "graphs": backend.compilations(),
        "loss": loss.item(),
        "gradients": [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients],
    }


MEASUREMENTS = {
    "gathers": {
        "bf16": functools.partial(count_gathers, "bf16"),
        "fp32": functools.partial(count_gathers, "fp32"),
        "discriminator": count_discriminator_gathers,
    },
    "compiles": {
        "eager": count_compiled,
        "compiled": functools.partial(count_compiled, compile=True, remat=1.0),
    },
}


def main(folder, what):
    """Make each measurement in processes of its own, which join a group of their own."""
    counted = [{}, {}]
    for name, function in MEASUREMENTS[what].items():
        (folder / name).mkdir()
        if status := fork_processes(folder / name, 2, function):
            return status
        for rank, found in enumerate(counted):
            found[name] = torch.load(folder / name / f"{rank}.pt")
    for rank, found in enumerate(counted):
        torch.save(found, folder / f"{rank}.pt")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
