"""Images per second of this sampler and of the published one's way, in turn in one process.

    python benchmarks/sampling.py [--scale digits|S|XL] [--images N] [--batch-size N]

The published way, as its scripts are described: torchdiffeq's Euler over the whole grid, which
keeps the trajectory; a batch of twice the rows for either guidance, at every step, of which half is
thrown away; each batch decoded and copied before the next begins. Both get the same networks, noise
and settings, and give pixels on the host. `XL` is for a GPU: the published DiT-DH-XL with a ViT-XL
decoder, in bf16; there the share of the chip's peak (MFU) is printed too.

Networks are random. The ratio is the median over rounds, in each of which both have a turn; the
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
from rae_xla.config.sections import MeshConfig
from rae_xla.registry import instantiate
from rae_xla.runtime import Runtime, start
from rae_xla.sample.generate import ImageSampler
from rae_xla.sample.pictures import to_pixels

XL = replace(
    SCALES["S"],
    model={"hidden_size": [1152, 2048], "depth": [28, 2], "num_heads": [16, 16]},
)
GUIDES = {
    "digits": {"hidden_size": [48, 192], "depth": [2, 2], "num_heads": [4, 4]},
    "S": {"hidden_size": [384, 1024], "depth": [4, 2], "num_heads": [6, 16]},
    "XL": SCALES["S"].model,
}
# what must be reached on a CPU, in `at least` times the published way
BARS = {"none": 1.0, "cfg": 1.0, "cfg, half the steps": 1.3, "autoguidance": 1.3}


def main() -> None:
    """Build, warm up, take turns, print."""
    args = read_arguments()
    scales = SCALES | {"XL": XL}
    precision = "bf16" if args.scale == "XL" else "fp32"
    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name), scales[args.scale], args.scale, precision, args.overrides)
        runtime = start(config.runtime, MeshConfig(), seed=0)
        rae, model, guide = make_networks(config, runtime)
    print(f"{args.images} images in batches of {args.batch_size} on {runtime.description}")
    print(f"{'guidance':<22}{'published':>11}{'ours':>9}{'ratio':>8}{'bar':>6}{'MFU':>7}")
    for guidance, settings in guidances(config).items():
        run = replace(config, guidance=settings)
        sampler = ImageSampler(run, runtime, rae, model, guide)
        plain = published_way(run, runtime, rae, model, guide)
        ours = our_way(sampler)
        difference = compare(ours, plain, args.batch_size)
        assert difference <= args.tolerance, f"pixels differ by up to {difference}"
        seconds: dict[Any, list[float]] = {plain: [], ours: []}
        for turn in range(args.rounds):
            for way in (plain, ours) if turn % 2 else (ours, plain):
                seconds[way].append(timed(way, args.images, args.batch_size, runtime))
        rates = [args.images / min(seconds[way]) for way in (plain, ours)]
        ratio = statistics.median(map(operator.truediv, seconds[plain], seconds[ours]))
        share = used_share(ours, rates[1], args.batch_size, runtime)
        print(
            f"{guidance:<22}{rates[0]:>11.2f}{rates[1]:>9.2f}{ratio:>8.2f}"
            f"{BARS[guidance]:>6.1f}{share:>7}",
            flush=True,
        )


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=[*SCALES, "XL"], default="digits")
    parser.add_argument("--images", type=int, default=64, help="in each round")
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
    """The run of a scale, with a guide."""
    path = make_world(folder, scale, images=1)
    content = yaml.safe_load(path.read_text())
    params = content["stage_2"]["params"] | GUIDES[name]
    content["guidance"] = {"guidance_model": {"target": "DiTDH", "params": params}}
    path.write_text(yaml.safe_dump(content))
    settings = ["runtime.backend=torch", f"runtime.precision={precision}"]
    return load_config(str(path), overrides=[*settings, *overrides])


def make_networks(config: RunConfig, runtime: Runtime) -> list[Any]:
    """The autoencoder, the transformer and its guide, with weights that give no zeros."""
    specs = (config.stage_1, config.stage_2, config.guidance.guidance_model)
    networks = [instantiate(spec).eval().requires_grad_(False) for spec in specs if spec]
    torch.manual_seed(0)
    for network in networks[1:]:
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    return [runtime.place(network) for network in networks]


def guidances(config: RunConfig) -> dict[str, Any]:
    """The settings that are compared; the interval holds half of the steps."""
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


def our_way(sampler: ImageSampler) -> Callable[[int, int], Iterator[Tensor]]:
    """Batches as `rae-xla sample` asks for them: one ahead of the writing, where that is ahead."""
    parts = 0 if sampler.runtime.device.type == "cpu" else 1

    def batches(images: int, size: int) -> Iterator[Tensor]:
        begun: list[Any] = []
        # On a CPU the sampler has a size of its own; it is asked for as many as make a batch.
        once = sampler.rows_per_device(size)
        for first in range(0, images, once):
            rows = torch.arange(first, min(first + once, images), dtype=torch.int32)
            begun.append(
                sampler.begin(0, rows, rows.long() % 10, torch.ones(len(rows), dtype=torch.bool))
            )
            if len(begun) > parts:
                yield torch.from_numpy(begun.pop(0)().pixels)
        for waited_for in begun:
            yield torch.from_numpy(waited_for().pixels)

    return batches


def published_way(
    config: RunConfig, runtime: Runtime, rae: Any, model: nn.Module, guide: nn.Module
) -> Callable[[int, int], Iterator[Tensor]]:
    """Batch after batch, with all that is computed and thrown away; a reading, no copy."""
    noise_of = ImageSampler(config, runtime, rae, model)._normal(0)
    guidance, null = config.guidance, config.misc.null_label
    grid = torch.tensor(_grid(config), device=runtime.device)

    def field(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        times = t.expand(len(x))
        with runtime.autocast():
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
            rows = torch.arange(first, min(first + size, images), device=runtime.device).int()
            y = rows.long() % 10
            x = noise_of(rows, torch.zeros((), dtype=torch.int32, device=runtime.device))
            if guidance.scale > 1:
                x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, null)])
            trajectory = odeint(lambda t, x, y=y: field(t, x, y), x, grid, method="euler")
            with runtime.autocast():
                yield to_pixels(rae.decode(trajectory[-1][: len(rows)])).cpu()

    return batches


def _grid(config: RunConfig) -> list[float]:
    from rae_xla.sample.generate import make_transport

    times: list[float] = make_transport(config).time_grid(config.sampler.params.num_steps).tolist()
    return times


def compare(ours: Any, plain: Any, size: int) -> int:
    """The largest difference of a pixel of one batch; also warms both up."""
    first, second = (torch.cat(list(way(size, size))).int() for way in (ours, plain))
    return int((first - second).abs().max())


def timed(way: Any, images: int, size: int, runtime: Runtime) -> float:
    """Seconds from the first noise to the last pixel on the host; on a CPU those that it worked,
    so that what else the machine does is not counted.
    """
    clock = time.process_time if runtime.on_cpu else time.perf_counter
    runtime.synchronize()
    begun = clock()
    count = sum(len(pixels) for pixels in way(images, size))
    seconds = clock() - begun
    assert count == images
    return seconds


def used_share(way: Any, images_per_second: float, size: int, runtime: Runtime) -> str:
    """Of the chip's peak, what the operations of these images amount to; `-` on a CPU."""
    chip = runtime.chip()
    if chip is None:
        return "-"
    with FlopCounterMode(display=False) as counted:
        list(way(size, size))
    flops = counted.get_total_flops() / size
    return f"{flops * images_per_second / chip.peak_flops:.1%}"


if __name__ == "__main__":
    main()
