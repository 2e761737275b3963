"""Compare the host time of a step that is traced with that of one that is replayed, on XLA.

    python benchmarks/host_time.py [--case NAME ...] [--devices 4] [--rounds 20]

Host time is the processor time of the main thread from the call of a compiled function to its
return, while the devices are idle. Both variants run in one process, in turn, on the same model;
every case has a process of its own. The models have the depth of the published ones and tiny
widths, so that little else than the number of operations and tensors counts.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gan_step import add_losses
from torch import Tensor
from world import SCALES, make_world

from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import MeshConfig, RuntimeConfig, load_config
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import Backend, start
from rae_xla.train.gan_step import Phase
from rae_xla.train.optimizers import AdamW
from rae_xla.train.tasks.autoencoder import AutoencoderTask
from rae_xla.train.train_step import make_train_step
from rae_xla.transport import create_transport, guided

LATENTS = (8, 4, 4)
BATCH = 8


@dataclass(frozen=True)
class Case:
    """One function to time.

    Attributes:
        make: returns the function and its arguments.
        depth: blocks of the two parts: encoder and head of a DiT-DH, or decoder and backbone of the
            discriminator of stage 1.
        scan: ``runtime.scan`` and ``runtime.remat``.
    """

    make: Callable[[Case, Backend], tuple[Callable[..., Any], tuple[Any, ...]]]
    depth: tuple[int, int]
    scan: bool = False


def make_model(case: Case) -> DiTDH:
    """Return a DiT-DH of tiny width with random weights."""
    torch.manual_seed(0)
    model = DiTDH(
        input_size=LATENTS[1], in_channels=LATENTS[0], hidden_size=(32, 32), depth=case.depth,
        num_heads=2, num_classes=4,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_train(case: Case, backend: Backend) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a train step of stage 2 and its arguments."""
    transport, model = create_transport(), make_model(case).train()
    state = make_state(model, backend)

    def losses(batch: dict[str, Tensor], draws: Any) -> Tensor:
        dropped = draws.uniform("label dropout") < 0.1
        return transport.training_losses(
            model, batch["x"], {"y": batch["y"], "label_drop": dropped},
            t=transport.sample_times(draws.uniform("time")), noise=draws.normal("noise", LATENTS),
        )["loss"]  # fmt: skip

    step = make_train_step(
        losses, state, AdamW((0.9, 0.95), 1e-8, 0.0), seed=0, ema_decay=0.999, clip_grad=1.0,
        accumulate=1, backend=backend,
    )  # fmt: skip
    batch = {
        "x": torch.randn(BATCH, *LATENTS), "y": torch.arange(BATCH) % 4,
        "row": torch.arange(BATCH, dtype=torch.int32), "step": torch.tensor(1, dtype=torch.int32),
        "lr": torch.tensor(1e-3),
    }  # fmt: skip
    return step, (backend.shard_batch(batch),)


def make_sampler(case: Case, backend: Backend) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return an Euler step with classifier-free guidance and its arguments."""
    model = backend.place(make_model(case).eval().requires_grad_(False))
    batch = backend.shard_batch({
        "x": torch.randn(BATCH, *LATENTS), "y": torch.arange(BATCH) % 4,
        "t": torch.full((BATCH,), 0.5),
    })  # fmt: skip

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            velocity = guided(model, y, scale=1.5, null_label=4).guided(x, t)
            return x - 0.02 * velocity

    return step, (batch["x"], batch["t"], batch["y"])


def make_gan(case: Case, backend: Backend) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a step of stage 1 with all losses, and its arguments."""
    depth, backbone = case.depth
    digits = SCALES["digits"]
    scale = replace(
        digits,
        encoder={"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 2},
        decoder={"hidden_size": 24, "layers": depth, "heads": 2},
    )
    recipe = {"depth": backbone, "embed_dim": 24, "num_heads": 2, "patch_size": 32}
    with tempfile.TemporaryDirectory() as name:
        file = make_world(Path(name), scale, images=BATCH)
        add_losses(file, Path(name), recipe)
        # The benchmark of the phases starts the losses one after another.
        starts = [f"gan.loss.{key}=0" for key in ("lpips_start", "disc_start", "disc_upd_start")]
        config = load_config(file, [*starts, "stage_2=null"])
        task = AutoencoderTask(config, backend, None, 1)
    state = make_state(task.model, backend, disc=task.disc)
    backend.place(task.frozen)
    step = task.make_step(Phase(lpips=True, gan=True, disc=True), state)
    batch = {
        "image": torch.zeros(BATCH, 3, digits.image, digits.image, dtype=torch.uint8),
        "row": torch.arange(BATCH, dtype=torch.int32), "step": torch.tensor(1, dtype=torch.int32),
        **task.inputs(1),
    }  # fmt: skip
    return step, (backend.shard_batch(batch),)


CASES = {
    "stage 2, 4 + 2 blocks": Case(make_train, (4, 2)),
    "stage 2, 28 + 2 blocks": Case(make_train, (28, 2)),
    "stage 2, 28 + 2 blocks, scan": Case(make_train, (28, 2), scan=True),
    "stage 1, 8 + 4 blocks": Case(make_gan, (8, 4)),
    "stage 1, 28 + 12 blocks, scan": Case(make_gan, (28, 12), scan=True),
    "sampler step, 28 + 2 blocks": Case(make_sampler, (28, 2)),
}


def host_seconds(fn: Callable[..., Any], inputs: tuple[Any, ...], backend: Backend) -> float:
    """Return the processor time of this thread for one call."""
    backend.synchronize()
    begin = time.thread_time()
    fn(*inputs)
    return time.thread_time() - begin


def run_case(name: str, devices: int, rounds: int) -> None:
    """Time one case and print its line."""
    from rae_xla.runtime.xla.replay import CapturedFunction, ReplayCounters

    case = CASES[name]
    settings = RuntimeConfig(backend="xla", devices=devices, scan=case.scan, remat=float(case.scan))
    backend = start(settings, MeshConfig())
    fn, inputs = case.make(case, backend)
    replayed = backend.compile(fn)
    traced = CapturedFunction(fn, ReplayCounters(), replay=False)
    times: dict[str, list[float]] = {"traced": [], "replayed": []}
    for function in (replayed, replayed, traced, replayed):  # compile and capture
        function(*inputs)
    for _ in range(rounds):
        times["traced"].append(host_seconds(traced, inputs, backend))
        times["replayed"].append(host_seconds(replayed, inputs, backend))
    medians = {kind: 1e3 * statistics.median(of) for kind, of in times.items()}
    spread = [1e3 * value for value in statistics.quantiles(times["replayed"], n=4)]
    print(
        f"{name:<30}{medians['traced']:>10.1f}{medians['replayed']:>10.2f}"
        f"   ({spread[0]:.2f} to {spread[2]:.2f}){medians['traced'] / medians['replayed']:>8.0f} x",
        flush=True,
    )


def main() -> None:
    """Time the cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        run_case(args.case[0], args.devices, args.rounds)
        return
    print(f"{'host ms per call':<30}{'traced':>10}{'replayed':>10}   (quartiles)      ratio")
    for name in args.case:
        command = [
            sys.executable, __file__, "--case", name, "--devices", str(args.devices),
            "--rounds", str(args.rounds), "--in-process",
        ]  # fmt: skip
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
