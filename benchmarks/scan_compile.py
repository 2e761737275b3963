"""How long a deep model's gradients take to compile, as one program and as a loop over its blocks.

    python benchmarks/scan_compile.py [--depth 28] [--devices 1]

Each is a process of its own. Prints the seconds of compiling, of all until the first result is
there (tracing and one run too), what the gradients differ by, and the ratio of the seconds of
compiling.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rae_xla.config import RuntimeConfig, load_config
from rae_xla.models.dit_dh import DiTDH
from rae_xla.runtime import start

BATCH = 8


def measure(depth: int, devices: int, scan: bool, out: Path) -> None:
    """In a process of its own: print the seconds, save loss and gradients."""
    settings = RuntimeConfig(backend="xla", devices=devices, scan=scan)
    runtime = start(settings, load_config(None).mesh)
    torch.manual_seed(0)
    model = DiTDH(
        input_size=4, in_channels=8, hidden_size=(64, 96), depth=(depth, 2), num_heads=4,
        num_classes=4,
    ).train()  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    batch = {
        "x": torch.randn(BATCH, 8, 4, 4),
        "t": torch.rand(BATCH),
        "y": torch.arange(BATCH) % 4,
    }
    runtime.place(model)

    @runtime.compile
    def gradients(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = model(**batch, label_drop=batch["y"] > 2).square().mean()
        parameters = dict(model.named_parameters())
        return [loss, *torch.autograd.grad(loss, [parameters[name] for name in names])]

    begin = time.perf_counter()
    found = runtime.to_host(dict(zip(["loss", *names], gradients(runtime.put(batch)), strict=True)))
    total = time.perf_counter() - begin
    from torch_xla.debug import metrics

    print(total, metrics.metric_data("CompileTime")[1] / 1e9)
    torch.save(found, out)


def main() -> None:
    """Measure both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=28, help="blocks of the encoder")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--only", choices=("loop", "unrolled"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args.depth, args.devices, args.only == "loop", args.out)
        return
    seconds, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("loop", "unrolled"):
            out = Path(folder) / kind
            done = subprocess.run(
                [sys.executable, __file__, "--depth", str(args.depth), "--devices",
                 str(args.devices), "--only", kind, "--out", str(out)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            total, seconds[kind] = map(float, done.stdout.split()[-2:])
            results[kind] = torch.load(out, weights_only=True)
            print(f"{kind:9s} {seconds[kind]:7.1f} s of {total:.1f} s", flush=True)
    worst = max(
        ((results["loop"][name] - value).abs().max() / value.abs().max().clamp(min=1e-12)).item()
        for name, value in results["unrolled"].items()
    )
    print(f"gradients differ by {worst:.1e} of their largest entry at most")
    print(f"unrolled / loop: {seconds['unrolled'] / seconds['loop']:.2f}")


if __name__ == "__main__":
    main()
