"""Time for which saving a checkpoint blocks training, and the duration of the complete save.

    python benchmarks/checkpoint_save.py [--parameters 20] [--dir FOLDER or gs://…]

For the state of a model (weights, moving average, two moments: 16 bytes per parameter) it measures,
several times: the copy to the host alone, the blocked time and the duration of a save, and the
duration of a save with the writer of ``torch.distributed.checkpoint``.
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

from rae_xla.checkpoint.manager import MANIFEST_FORMAT
from rae_xla.checkpoint.saver import Saver
from rae_xla.config import CheckpointConfig, MeshConfig, RuntimeConfig
from rae_xla.runtime import start

ROUNDS, WIDTH = 3, 1024


def main() -> None:
    """Measure, and print durations and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=20, help="millions (default: 20)")
    parser.add_argument("--dir", help="where to save (default: a temporary folder)")
    args = parser.parse_args()
    settings = RuntimeConfig(backend="torch")
    backend = start(settings, MeshConfig())
    layers = max(1, round(args.parameters * 1e6 / WIDTH**2))
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    state = {
        f"{part}/{name}": tensor.clone().to(backend.device)
        for part in ("model", "ema", "exp_avg", "exp_avg_sq")
        for name, tensor in weights.items()
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    print(f"{size / 1e9:.2f} GB in {len(state)} tensors on {backend.device}")

    with tempfile.TemporaryDirectory() as folder:
        one = replace(CheckpointConfig(), keep_last=1)
        facts = {"format": MANIFEST_FORMAT, "step": 0}
        saver = Saver(args.dir or folder, backend, one, lambda: (state, facts))
        for step in range(ROUNDS):
            began = time.perf_counter()
            backend.snapshot(state)
            copy = time.perf_counter() - began
            assert saver.start(step)
            saver.wait()
            assert saver.failure is None
            metrics = saver.take_metrics()
            blocked, total = metrics["ckpt/blocked_seconds"], metrics["ckpt/seconds"]
            began = time.perf_counter()
            if args.dir is None:
                dcp.save(state, checkpoint_id=f"{folder}/torch", no_dist=True)
                shutil.rmtree(f"{folder}/torch")
            torch_total = time.perf_counter() - began
            print(
                f"copy alone {copy:.3f} s, training blocked {blocked:.3f} s ({blocked / copy:.2f}),"
                f" save {total:.2f} s ({total / blocked:.0f} x), torch's save {torch_total:.2f} s"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
