"""Compare the compile time of a training step with unrolled blocks and with a loop over blocks.

    python benchmarks/scan_compile.py [--depth 28] [--devices 1]           # on the CPU; runs
    python benchmarks/scan_compile.py [--depth 28] --topology v6e:4x4      # for a TPU; compiles

The complete step: forward, backward, clipping, AdamW and moving average; for a TPU also
the frozen encoder (here of one layer), as `rae-xla plan` compiles it. Each variant is traced and
compiled in processes of its own. The script prints wall-clock and processor seconds; the latter are
more reliable on a busy machine. On the CPU it also prints how much losses and parameters differ
after three steps.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rae_xla import load_config
from rae_xla.checkpoint.train_state import make_state
from rae_xla.config import OptimizerConfig, RuntimeConfig
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start
from rae_xla.tools.plan.networks import without_weights
from rae_xla.train.optimizers import AdamW
from rae_xla.train.train_step import make_train_step

BATCH, STEPS = 64, 3
WIDTHS, HEADS = (256, 384), 4
CONFIG = Path(__file__).parents[1] / "configs/stage2/ditdh_xl_256.yaml"


def run_steps(depth: int, devices: int, scan: bool, out: Path) -> None:
    """Run three steps in this process; print the seconds, save losses and parameters."""
    settings = RuntimeConfig(backend="xla", devices=devices, scan=scan)
    backend = start(settings, load_config(None).mesh)
    torch.manual_seed(0)
    model = DiTDH(
        input_size=4, in_channels=8, hidden_size=WIDTHS, depth=(depth, 2), num_heads=HEADS,
        num_classes=4,
    ).train()  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = {
        "x": torch.randn(BATCH, 8, 4, 4), "t": torch.rand(BATCH), "y": torch.arange(BATCH) % 4,
        "row": torch.arange(BATCH, dtype=torch.int32), "lr": torch.tensor(1e-3),
    }  # fmt: skip
    state = make_state(model, backend)

    def losses(batch, draws):
        velocity = model(batch["x"], batch["t"], batch["y"], label_drop=batch["y"] > 2)
        return (velocity - batch["x"]).square().mean((1, 2, 3))

    step = make_train_step(
        losses, state, AdamW.from_config(OptimizerConfig()), seed=0, ema_decay=0.99, clip_grad=1.0,
        accumulate=1, backend=backend,
    )  # fmt: skip
    compiled = backend.compile(step)
    backend.synchronize()
    losses_of_steps, begin = [], (time.perf_counter(), _processor_seconds(resource.RUSAGE_SELF))
    for number in range(STEPS):
        inputs = batch | {"step": torch.tensor(number, dtype=torch.int32)}
        losses_of_steps += backend.fetch([compiled(backend.shard_batch(inputs))])
        if number == 0:
            end = (time.perf_counter(), _processor_seconds(resource.RUSAGE_SELF))
    print(*(later - earlier for earlier, later in zip(begin, end, strict=True)))
    torch.save(
        {"losses": torch.stack(losses_of_steps)} | backend.to_host(state.model.parameters()), out
    )


def on_cpu(folder: Path, depth: int, devices: int, scan: bool) -> tuple[float, float]:
    """Return wall-clock and processor seconds until the first step has run."""
    arguments = [
        "--depth",
        str(depth),
        "--devices",
        str(devices),
        "--out",
        str(folder / _kind(scan)),
    ]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, *(["--scan"] if scan else [])],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    clock, processors = map(float, done.stdout.split()[-2:])
    return clock, processors


def for_tpu(folder: Path, depth: int, topology: str, scan: bool) -> tuple[float, float]:
    """Return wall-clock and processor seconds of tracing and compiling, without imports."""
    from rae_xla.tools.plan.tpus import parse_topology

    chips = parse_topology(topology)
    config = load_config(CONFIG, overrides=[
        f"stage_2.params.depth=[{depth},2]", f"stage_2.params.hidden_size={list(WIDTHS)}",
        f"stage_2.params.num_heads=[{HEADS},{HEADS}]", "runtime.precision=bf16",
        f"runtime.scan={scan}", f"training.global_batch_size={BATCH}", "data.train=null",
    ])  # fmt: skip
    config, _ = without_weights(config, folder / "encoder")
    description = folder / "encoder/config.json"
    shallow = json.loads(description.read_text()) | {"num_hidden_layers": 1}
    description.write_text(json.dumps(shallow))
    base = str(folder / _kind(scan))
    config.save(Path(base + ".yaml"))
    jobs = {
        "trace": {"config": base + ".yaml", "task": "stage2", "chips": chips.chips,
                  "slices": chips.slices, "batch": BATCH, "out": base},
        "compile": {"step": base, "topology": topology, "effort": "fast", "out": base + ".tpu"},
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"PJRT_DEVICE": "CPU"}
    clock, before = 0.0, _processor_seconds(resource.RUSAGE_CHILDREN)
    for name, job in jobs.items():
        file = Path(f"{base}.{name}-job.json")
        file.write_text(json.dumps(job))
        subprocess.run(
            [sys.executable, "-m", f"rae_xla.tools.plan.{name}", str(file)], check=True,
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        result = json.loads(Path(job["out"] + ".json").read_text())
        clock += result["seconds"]
        now = _processor_seconds(resource.RUSAGE_CHILDREN)
        print(f"  {_kind(scan)} {name}: {result['seconds']:.1f} s, {now - before:.1f} s so far",
              flush=True)  # fmt: skip
    return clock, _processor_seconds(resource.RUSAGE_CHILDREN) - before


def _processor_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _kind(scan: bool) -> str:
    return "loop" if scan else "unrolled"


def main() -> None:
    """Measure both variants and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=28, help="blocks of the encoder")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--topology", help="compile for this TPU topology instead")
    parser.add_argument("--scan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        run_steps(args.depth, args.devices, args.scan, args.out)
        return
    seconds = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for scan in (True, False):
            if args.topology:
                seconds[scan] = for_tpu(folder, args.depth, args.topology, scan)
            else:
                seconds[scan] = on_cpu(folder, args.depth, args.devices, scan)
            print(
                f"{_kind(scan):9s} {seconds[scan][0]:7.1f} s, of processors {seconds[scan][1]:.1f}"
            )
        if not args.topology:
            loop, unrolled = (
                torch.load(folder / _kind(scan), weights_only=True) for scan in (True, False)
            )
            print("losses", *(result["losses"][:, 0].tolist() for result in (loop, unrolled)))
            worst = max(
                ((loop[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
                for name, value in unrolled.items()
            )
            print(f"losses and parameters differ by {worst:.1e} of their largest entry at most")
    clock, processors = (u / s for u, s in zip(seconds[False], seconds[True], strict=True))
    print(f"unrolled / loop: {clock:.2f}, processor time {processors:.2f}")


if __name__ == "__main__":
    main()
