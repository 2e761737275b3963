"""What a save takes of the training thread, beside the whole of it.

    python benchmarks/checkpoint_save.py [--parameters 20] [--dir FOLDER or gs://…]

The state of a model with so many million parameters (weights, average, two moments: 16 bytes each)
is saved, copied to memory by itself, and written by ``torch.distributed.checkpoint``'s own writer,
all several times.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from rae_xla.config import CheckpointConfig, MeshConfig, RuntimeConfig
from rae_xla.interop.checkpoint_folder import FORMAT
from rae_xla.runtime import start
from rae_xla.train.saver import Saver

ROUNDS, WIDTH = 3, 1024


def main() -> None:
    """Save, and print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=20, help="millions")
    parser.add_argument("--dir", help="where to (default: a temporary folder)")
    args = parser.parse_args()
    settings = RuntimeConfig(backend="torch")
    runtime = start(settings, MeshConfig())
    layers = max(1, round(args.parameters * 1e6 / WIDTH**2))
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    state = {
        f"{part}/{name}": tensor.clone().to(runtime.device)
        for part in ("model", "ema", "exp_avg", "exp_avg_sq")
        for name, tensor in weights.items()
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    print(f"{size / 1e9:.2f} GB in {len(state)} tensors on {runtime.device}")

    with tempfile.TemporaryDirectory() as folder:
        one = replace(CheckpointConfig(), keep_last=1)
        facts = {"format": FORMAT, "step": 0}
        saver = Saver(args.dir or folder, runtime, one, print, lambda: (state, facts))
        for step in range(ROUNDS):
            began = time.perf_counter()
            runtime.snapshot(state)
            copy = time.perf_counter() - began
            assert saver.start(step)
            saver.wait()
            assert saver.failure is None
            figures = saver.take_figures()
            blocked, whole = figures["ckpt/blocked_seconds"], figures["ckpt/seconds"]
            began = time.perf_counter()
            if args.dir is None:
                dcp.save(state, checkpoint_id=f"{folder}/theirs", no_dist=True)
                shutil.rmtree(f"{folder}/theirs")
            theirs = time.perf_counter() - began
            print(
                f"copy alone {copy:.3f} s, training blocked {blocked:.3f} s ({blocked / copy:.2f}),"
                f" whole save {whole:.2f} s ({whole / blocked:.0f} x), torch's {theirs:.2f} s"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
