"""Compare images per second of this sampler with those of the published sampling procedure.

    python benchmarks/sampling.py [--scale digits|S|XL] [--images N] [--batch-size N]

The published procedure is a reimplementation from its description: torchdiffeq's Euler over the
complete grid, which keeps the trajectory; for any guidance, a batch of twice the rows at every
step, of which half is discarded; each batch is decoded and copied before the next one starts. Both
samplers get the same networks, noise and settings, and return pixels on the host. `XL` is for a
GPU: the published DiT-DH-XL with a ViT-XL decoder, in bf16; the model FLOPs utilisation (MFU) is
printed too.

Networks are random. Both samplers run in every round; the ratio is the median over rounds, and the
rates are those of the best round.
"""

from __future__ import annotations

import argparse
import operator
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchdiffeq import odeint
from world import SCALES, Scale, make_world

from rae_xla.config import RunConfig, load_config
from rae_xla.config.schema import MeshConfig
from rae_xla.interop.instantiate import instantiate
from rae_xla.runtime import Backend, start
from rae_xla.sample.images import to_pixels
from rae_xla.sample.sampler import ImageSampler

XL = replace(
    SCALES["S"],
    model={"hidden_size": [1152, 2048], "depth": [28, 2], "num_heads": [16, 16]},
)
GUIDES = {
    "digits": {"hidden_size": [48, 192], "depth": [2, 2], "num_heads": [4, 4]},
    "S": {"hidden_size": [384, 1024], "depth": [4, 2], "num_heads": [6, 16]},
    "XL": SCALES["S"].model,
}
# The least ratios that are required on a CPU.
REQUIRED_RATIOS = {"none": 1.0, "cfg": 1.0, "cfg, half the steps": 1.3, "autoguidance": 1.3}


def main() -> None:
    """Build both samplers, warm up, run the rounds and print a table."""
    args = read_arguments()
    scales = SCALES | {"XL": XL}
    precision = "bf16" if args.scale == "XL" else "fp32"
    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name), scales[args.scale], args.scale, precision, args.overrides)
        backend = start(config.runtime, MeshConfig(), seed=0)
        rae, model, guide = make_networks(config, backend)
    print(f"{args.images} images in batches of {args.batch_size} on {backend.description}")
    print(f"{'guidance':<22}{'published':>11}{'ours':>9}{'ratio':>8}{'bar':>6}{'MFU':>7}")
    for guidance, settings in guidances(config).items():
        run = replace(config, guidance=settings)
        sampler = ImageSampler(run, backend, rae, model, guide)
        plain = published_sampler(run, backend, rae, model, guide)
        ours = batched_sampler(sampler)
        difference = compare(ours, plain, args.batch_size)
        assert difference <= args.tolerance, f"pixels differ by up to {difference}"
        seconds: dict[Any, list[float]] = {plain: [], ours: []}
        for number in range(args.rounds):
            for sample in (plain, ours) if number % 2 else (ours, plain):
                seconds[sample].append(timed(sample, args.images, args.batch_size, backend))
        rates = [args.images / min(seconds[sample]) for sample in (plain, ours)]
        ratio = statistics.median(map(operator.truediv, seconds[plain], seconds[ours]))
        share = flops_utilisation(ours, rates[1], args.batch_size, backend)
        print(
            f"{guidance:<22}{rates[0]:>11.2f}{rates[1]:>9.2f}{ratio:>8.2f}"
            f"{REQUIRED_RATIOS[guidance]:>6.1f}{share:>7}",
            flush=True,
        )


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=[*SCALES, "XL"], default="digits")
    parser.add_argument("--images", type=int, default=64, help="images per round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25, help="grid points")
    parser.add_argument(
        "--tolerance", type=int, default=255, help="levels a pixel may differ by (fp32: 1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    args.overrides = [f"sampler.params.num_steps={args.steps}", *args.overrides]
    return args


def make_config(
    folder: Path, scale: Scale, name: str, precision: str, overrides: list[str]
) -> RunConfig:
    """Return the configuration of a scale, with a guide."""
    path = make_world(folder, scale, images=1)
    content = yaml.safe_load(path.read_text())
    params = content["stage_2"]["params"] | GUIDES[name]
    content["guidance"] = {"guidance_model": {"target": "DiTDH", "params": params}}
    path.write_text(yaml.safe_dump(content))
    settings = ["runtime.backend=torch", f"runtime.precision={precision}"]
    return load_config(str(path), overrides=[*settings, *overrides])


def make_networks(config: RunConfig, backend: Backend) -> list[Any]:
    """Return the autoencoder, the transformer and its guide, without zero-initialised weights."""
    specs = (config.stage_1, config.stage_2, config.guidance.guidance_model)
    networks = [instantiate(spec).eval().requires_grad_(False) for spec in specs if spec]
    torch.manual_seed(0)
    for network in networks[1:]:
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return [backend.place(network) for network in networks]


def guidances(config: RunConfig) -> dict[str, Any]:
    """Return the guidance settings to compare; the interval contains half of the steps."""
    grid = torch.tensor(_grid(config))[:-1]
    middle = float((grid[len(grid) // 2 - 1] + grid[len(grid) // 2]) / 2)
    plain = replace(config.guidance, scale=1.0)
    cfg = replace(plain, method="cfg", scale=1.5)
    return {
        "none": plain,
        "cfg": cfg,
        "cfg, half the steps": replace(cfg, t_max=middle),
        "autoguidance": replace(cfg, method="autoguidance"),
    }


def batched_sampler(sampler: ImageSampler) -> Callable[[int, int], Iterator[Tensor]]:
    """Return a function that dispatches batches as `rae-xla sample` does: one ahead on a GPU."""
    ahead = 0 if sampler.backend.device.type == "cpu" else 1

    def batches(images: int, size: int) -> Iterator[Tensor]:
        pending: list[Any] = []
        # On a CPU, the sampler determines the batch size.
        batch = sampler.rows_per_device(size)
        for first in range(0, images, batch):
            indices = torch.arange(first, min(first + batch, images), dtype=torch.int32)
            wanted = torch.ones(len(indices), dtype=torch.bool)
            pending.append(sampler.dispatch(0, indices, indices.long() % 10, wanted))
            if len(pending) > ahead:
                yield torch.from_numpy(pending.pop(0)().pixels)
        for wait in pending:
            yield torch.from_numpy(wait().pixels)

    return batches


def published_sampler(
    config: RunConfig, backend: Backend, rae: Any, model: nn.Module, guide: nn.Module
) -> Callable[[int, int], Iterator[Tensor]]:
    """Return a function that samples batch after batch; written from the published description."""
    noise_function = ImageSampler(config, backend, rae, model)._noise_function(0)
    guidance, null = config.guidance, config.misc.null_label
    grid = torch.tensor(_grid(config), device=backend.device)

    def field(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        times = t.expand(len(x))
        with backend.autocast():
            out = model(x, times, y).float()
            if guidance.scale <= 1:
                return out
            inside = ((times >= guidance.t_min) & (times <= guidance.t_max)).view(-1, 1, 1, 1)
            if guidance.method == "autoguidance":
                weak = guide(x, times, y).float()
                return torch.where(inside, weak + guidance.scale * (out - weak), out)
        strong, weak = out.chunk(2)
        half = weak + guidance.scale * (strong - weak)
        half = torch.where(inside[: len(half)], half, strong)
        return torch.cat([half, half])

    @torch.no_grad()
    def batches(images: int, size: int) -> Iterator[Tensor]:
        for first in range(0, images, size):
            rows = torch.arange(first, min(first + size, images), device=backend.device).int()
            y = rows.long() % 10
            x = noise_function(rows, torch.zeros((), dtype=torch.int32, device=backend.device))
            if guidance.scale > 1:
                x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, null)])
            trajectory = odeint(lambda t, x, y=y: field(t, x, y), x, grid, method="euler")
            with backend.autocast():
                yield to_pixels(rae.decode(trajectory[-1][: len(rows)])).cpu()

    return batches


def _grid(config: RunConfig) -> list[float]:
    from rae_xla.sample.sampler import make_transport

    times: list[float] = make_transport(config).time_grid(config.sampler.params.num_steps).tolist()
    return times


def compare(ours: Any, plain: Any, size: int) -> int:
    """Return the largest difference of a pixel in one batch; this also warms both up."""
    first, second = (torch.cat(list(sample(size, size))).int() for sample in (ours, plain))
    return int((first - second).abs().max())


def timed(sample: Any, images: int, size: int, backend: Backend) -> float:
    """Return the seconds from the first noise to the last pixel on the host.

    On a CPU, this is processor time, so that other programs do not affect it.
    """
    clock = time.process_time if backend.on_cpu else time.perf_counter
    backend.synchronize()
    start_time = clock()
    count = sum(len(pixels) for pixels in sample(images, size))
    seconds = clock() - start_time
    assert count == images
    return seconds


def flops_utilisation(sample: Any, images_per_second: float, size: int, backend: Backend) -> str:
    """Return the share of the accelerator's peak FLOP/s that sampling uses; `-` on a CPU."""
    accelerator = backend.accelerator()
    if accelerator is None:
        return "-"
    with FlopCounterMode(display=False) as counted:
        list(sample(size, size))
    flops = counted.get_total_flops() / size
    return f"{flops * images_per_second / accelerator.peak_flops:.1%}"


if __name__ == "__main__":
    main()
