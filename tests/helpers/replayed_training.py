"""Train a tiny DiT-DH with replayed and with traced steps, and compare every bit of both.

``python replayed_training.py DEVICES compare STEPS`` prints ``compare`` as JSON, ``python
replayed_training.py DEVICES describe STEP`` prints ``describe_program``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch_xla.debug.metrics as met
from torch import Tensor, nn

from rae_xla.checkpoint.train_state import TrainState, make_state
from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import Backend, start
from rae_xla.runtime.xla.captured_program import _External as External
from rae_xla.runtime.xla.replay import CapturedFunction, ReplayCounters
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import TrainStep, make_train_step
from rae_xla.transport import create_transport, guided

LATENTS = (8, 4, 4)
ROWS = 4
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def make_training(backend: Backend, saved: dict[str, Any] | None) -> tuple[TrainState, TrainStep]:
    """Return a state, new or restored, and the step that updates it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"input_size": LATENTS[1], "in_channels": LATENTS[0]}
    model = DiTDH(**sizes, hidden_size=(16, 16), depth=(1, 1), num_heads=2, num_classes=4).train()
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(parameter, std=0.1)
    state, transport = make_state(model, backend, saved), create_transport()

    def losses(batch: Any, draws: Any) -> Tensor:
        return transport.training_losses(
            model, batch["x"], {"y": batch["y"], "label_drop": draws.uniform("drop") < 0.1},
            t=transport.sample_times(draws.uniform("time")), noise=draws.normal("noise", LATENTS),
        )["loss"]  # fmt: skip

    optimizer = AdamW((0.9, 0.95), 1e-8, 0.01)
    step = make_train_step(
        losses, state, optimizer, seed=0, ema_decay=0.9, clip_grad=1.0, accumulate=1,
        backend=backend,
    )  # fmt: skip
    return state, step


def make_batch(number: int, rows: int = ROWS, *, usable: bool = True) -> dict[str, Tensor]:
    """Return the batch of a step on the host; the step skips one that is not ``usable``."""
    x = torch.randn(rows, *LATENTS, generator=torch.Generator().manual_seed(number))
    return {
        "x": x if usable else x * float("nan"),
        "y": torch.arange(rows) % 4,
        "row": torch.arange(rows, dtype=torch.int32),
        "step": torch.tensor(number, dtype=torch.int32),
        "lr": torch.tensor(1e-3 / (1 + number)),
    }


def host_state(state: TrainState, backend: Backend) -> dict[str, Any]:
    """Return what a checkpoint contains."""
    parts = {
        "model": state.model.module.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.model.optimizer_tensors(),
    }
    return {part: backend.to_host(tensors) for part, tensors in parts.items()} | {"step": 0}


def preview_of(state: TrainState) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a solver step with the averaged model, as sample images and evaluations take it."""

    def preview(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            times = torch.full_like(batch["y"], 0.5, dtype=torch.float32)
            model = guided(state.ema, batch["y"], scale=1.5, null_label=4)
            return batch["x"] - 0.5 * model.guided(batch["x"], times)

    return preview


def run(backend: Backend, steps: int, compile_: Compile) -> tuple[dict[str, bytes], dict[str, int]]:
    """Train with a checkpoint, a preview, an evaluation, a skipped step and a rollback.

    Returns:
        The bits of everything that is read, by name, and counts: graphs that the steps compiled,
        tensors that replayed steps copied to the host, and skipped steps.
    """
    seen: dict[str, bytes] = {}
    counts = {"compilations": 0, "reads": 0, "skipped": 0}
    state, step = make_training(backend, None)
    compiled, preview = compile_(step), compile_(preview_of(state))
    checkpoint: dict[str, Any] = {}

    def record(name: str, tensors: dict[str, Tensor]) -> None:
        seen.update({f"{name}/{n}": t.detach().numpy().tobytes() for n, t in tensors.items()})

    for number in range(steps):
        batch = backend.shard_batch(make_batch(number, usable=number != steps * 3 // 5))
        compilations, captures, reads = backend.compilations(), backend.captures(), _reads()
        result = compiled(batch)
        counts["compilations"] += backend.compilations() - compilations
        if backend.captures() == captures:  # a captured call compares constants on the host
            counts["reads"] += _reads() - reads
        [values] = backend.fetch([result])
        metrics = dict(zip(step.metric_names, values, strict=True))
        counts["skipped"] += int(metrics["train/skipped"])
        record(f"step {number}", metrics)
        if number == steps // 5:
            checkpoint = host_state(state, backend)
            for part in ("model", "ema", "optimizer"):
                record(f"checkpoint {part}", checkpoint[part])
        if number in {steps * 2 // 5, steps * 4 // 5}:
            rows = ROWS if steps < 50 or number == steps * 2 // 5 else 2 * ROWS
            placed = backend.shard_batch(make_batch(number, rows))
            record(f"preview {number}", backend.to_host({"x": preview(placed)}))
        if number == steps * 7 // 10:
            state, step = make_training(backend, checkpoint)
            compiled, preview = compile_(step), compile_(preview_of(state))
    for part, tensors in host_state(state, backend).items():
        if part != "step":
            record(f"end {part}", tensors)
    return seen, counts


def _reads() -> int:
    data = met.metric_data("TransferFromDeviceTime")
    return int(data[0]) if data else 0


def compare(backend: Backend, steps: int) -> dict[str, Any]:
    """Train twice; return what differs, what was counted, and what fell back to the host."""
    replays = backend.replay_counters.replays  # type: ignore[attr-defined]
    replayed, counts = run(backend, steps, backend.compile)
    replays = backend.replay_counters.replays - replays  # type: ignore[attr-defined]
    traced, _ = run(backend, steps, lambda fn: CapturedFunction(fn, ReplayCounters(), replay=False))
    names = replayed.keys() | traced.keys()
    return {
        "different": sorted(n for n in names if replayed.get(n) != traced.get(n)),
        "compared": len(names),
        "replays": replays,
        "fallbacks": backend.fallbacks(),
        **counts,
    }


def describe_program(backend: Backend, number: int) -> list[str]:
    """Capture a train step with the batch ``number``.

    Returns:
        The key of the program, the origin of its inputs in order, and what it updates.
    """
    unrelated = [backend.shard_batch({"x": torch.zeros(ROWS)}) for _ in range(number)]
    state, step = make_training(backend, None)
    compiled: Any = backend.compile(step)
    compiled(backend.shard_batch(make_batch(number)))
    [program] = compiled._programs
    names = {id(tensor): f"model {name}" for name, tensor in state.model.parameters().items()}
    names |= {id(tensor): name for name, tensor in state.model.optimizer_tensors().items()}
    names |= {id(tensor): f"ema {name}" for name, tensor in state.ema.named_parameters()}

    def describe(source: Any) -> str:
        if isinstance(source, External):
            return " ".join(sorted({names.get(id(t), "frozen") for t in source.tensors()}))
        return f"{type(source).__name__} {getattr(source, 'index', '')}"

    assert len(unrelated) == number
    return [program.hash.hex(), *map(describe, program.sources), *map(describe, program.updated)]


def main(devices: str, function: str, number: str) -> None:
    """Print the result of a function as JSON."""
    backend = start(RuntimeConfig(backend="xla", devices=int(devices)), MeshConfig())
    chosen: Callable[..., Any] = {"compare": compare, "describe": describe_program}[function]
    print(json.dumps(chosen(backend, int(number))))


if __name__ == "__main__":
    main(*sys.argv[1:])
