"""Compare an eager train step with the way of the published loop: the same model, weights and data.

    OMP_NUM_THREADS=1 python benchmarks/eager_step.py [--rounds 9] [--width 288 768]

The published way is torch's AdamW, ``clip_grad_norm_``, ``torch.randn`` and a loop over named
parameters for the moving average. Both sides take turns; times are of the processor, in fp32 on the
CPU. Launches and bytes are those of a CUDA device, where torch's AdamW and clipping are foreach
operations; they are counted from the operations that PyTorch dispatches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from eager_costs import EagerCosts
from published_loop import PublishedLoop

from rae_xla.checkpoint.train_state import TrainState, make_state
from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.ops import eager_random
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, start
from rae_xla.train.ema import update_ema
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import TrainStep, apply_gradients, make_train_step
from rae_xla.transport import create_transport
from rae_xla.transport.transport import Transport

CLASSES, CHANNELS, SIDE, DROPOUT = 1000, 768, 16, 0.1


def build_model(width: list[int], depth: list[int]) -> DiTDH:
    """Build a DiT-DH with random weights, of which none are zero."""
    torch.manual_seed(0)
    model = DiTDH(SIDE, 1, CHANNELS, width, depth, [8, 8], num_classes=CLASSES)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def build_step(
    model: DiTDH, transport: Transport, backend: Backend
) -> tuple[TrainStep, TrainState]:
    """Build the step of the diffusion task, of latents instead of images."""
    state = make_state(model, backend)

    def loss(batch: dict[str, Tensor], draws: CounterRNG) -> Tensor:
        latents = batch["latents"]
        dropout, for_time = draws.uniforms("label dropout", "time")
        return transport.training_losses(
            model,
            latents,
            {"y": batch["label"], "label_drop": dropout < DROPOUT},
            t=transport.sample_times(for_time),
            noise=draws.normal("noise", latents.shape[1:]),
        )["loss"]

    step = make_train_step(
        loss,
        state,
        AdamW((0.9, 0.95), 1e-8, 0.0),
        seed=0,
        ema_decay=0.9995,
        clip_grad=1.0,
        accumulate=1,
        backend=backend,
    )
    return step, state


def processor_time(work: Callable[[], object]) -> float:
    """Return the milliseconds of the processor that ``work`` takes."""
    begin = time.process_time()
    work()
    return 1e3 * (time.process_time() - begin)


def compare(
    title: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> None:
    """Time both alternately and print medians, and the median and the range of their ratios."""
    ours(), theirs()
    pairs = []
    for number in range(rounds):
        if number % 2:
            second = processor_time(theirs)
            pairs.append((processor_time(ours), second))
        else:
            pairs.append((processor_time(ours), processor_time(theirs)))
    ratios = sorted(b / a for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{title:<28}{mine:>9.1f}{other:>11.1f}{statistics.median(ratios):>8.2f}"
        f"   {ratios[0]:.2f} to {ratios[-1]:.2f}",
        flush=True,
    )


def counted(work: Callable[[], object]) -> EagerCosts:
    """Return the costs of ``work``."""
    with EagerCosts() as costs:
        work()
    return costs


def main() -> None:
    """Compare whole steps and their parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, nargs=2, default=[288, 768])
    parser.add_argument("--depth", type=int, nargs=2, default=[8, 2])
    args = parser.parse_args()
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    transport = create_transport()
    model = build_model(args.width, args.depth)
    theirs = PublishedLoop(build_model(args.width, args.depth), transport)
    on_cuda = PublishedLoop(build_model(args.width, args.depth), transport, foreach=True)
    step, state = build_step(model, transport, backend)
    latents = torch.randn(args.batch, CHANNELS, SIDE, SIDE)
    labels = torch.arange(args.batch) % CLASSES
    batch = {
        "latents": latents,
        "label": labels,
        "row": torch.arange(args.batch, dtype=torch.int32),
        "step": torch.tensor(3, dtype=torch.int32),
        "lr": torch.tensor(2e-4),
    }
    draws = CounterRNG(0, batch["step"], batch["row"])

    def draw() -> None:
        draws.uniforms("label dropout", "time")
        draws.normal("noise", latents.shape[1:])

    def their_draw() -> None:
        torch.rand(len(labels))
        torch.randn_like(latents)
        torch.rand(len(labels))

    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.randn_like(p) for p in parameters]

    def update() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient  # cleared by every update
        loss, lr, count = torch.zeros(()), batch["lr"], batch["step"]
        apply_gradients(state.model, AdamW((0.9, 0.95), 1e-8, 0.0), loss, lr, count, backend, 1.0)
        update_ema(state.ema, model, 0.9995, backend.local_shards)

    millions, count = sum(p.numel() for p in model.parameters()) / 1e6, len([*model.parameters()])
    print(f"DiT-DH of {millions:.1f} M parameters in {count} tensors, batch {args.batch}, ", end="")
    print(f"{torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print(f"{'processor time, ms':<28}{'ours':>9}{'published':>11}{'ratio':>8}   range")
    compare("step", lambda: step(batch), lambda: theirs.step(latents, labels), args.rounds)
    compare("optimizer, clipping, EMA", update, theirs.update, args.rounds)
    compare("draws", draw, their_draw, args.rounds)

    print(f"\n{'counted, as on CUDA':<28}{'ours':>9}{'published':>11}{'ratio':>8}")
    on_cuda.step(latents, labels)  # makes the state of the optimizer
    eager_random.CPU_BLOCK = latents.numel()  # accelerators draw in one block
    parts = counted(update), counted(on_cuda.update), counted(draw), counted(their_draw)
    launches = [costs.launches for costs in parts]
    _print_ratio("launches, update", launches[0], launches[1])
    _print_ratio("launches, update and draws", launches[0] + launches[2], launches[1] + launches[3])
    moved = [costs.moved / millions / 1e6 for costs in parts]
    _print_ratio("bytes a parameter, update", moved[0], moved[1])


def _print_ratio(title: str, ours: float, theirs: float) -> None:
    print(f"{title:<28}{ours:>9.0f}{theirs:>11.0f}{theirs / ours:>8.2f}")


if __name__ == "__main__":
    main()
