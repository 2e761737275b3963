"""Images per second of the sampler by memory format and mode of torch.compile, in one process.

    python benchmarks/sampling_modes.py [--scale digits|S|XL] [--images N] [--batch-size N]

The same networks, noise and settings for every way, without guidance: as it is (contiguous tensors,
no compilation), with channels last, compiled by torch's default, and with `max-autotune`; on a GPU
with CUDA graphs (`reduce-overhead`) too. Each way has a turn in every round; a ratio is the median
over rounds of its speed to that of the first way. On a CPU the time is that of the processors.
"""

from __future__ import annotations

import operator
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sampling import XL, compare, make_config, make_networks, our_way, read_arguments, timed
from world import SCALES

from rae_xla.config.sections import MeshConfig
from rae_xla.runtime import start
from rae_xla.sample.generate import ImageSampler


def modes(on_gpu: bool) -> dict[str, tuple[torch.memory_format, str | None]]:
    """Memory format of the networks and mode of torch.compile (None: not compiled), by name."""
    plain, last = torch.contiguous_format, torch.channels_last
    tuned = "max-autotune" if on_gpu else "max-autotune-no-cudagraphs"
    found: dict[str, tuple[torch.memory_format, str | None]] = {
        "as it is": (plain, None),
        "channels last": (last, None),
        "compiled": (plain, "default"),
        "compiled, channels last": (last, "default"),
        f"compiled, {tuned}": (plain, tuned),
    }
    return found | ({"compiled, CUDA graphs": (plain, "reduce-overhead")} if on_gpu else {})


def main() -> None:
    """Build, warm up, take turns, print."""
    args = read_arguments()
    precision = "bf16" if args.scale == "XL" else "fp32"
    ways: dict[str, Any] = {}
    networks: dict[torch.memory_format, Any] = {}  # ways of one format share them
    with tempfile.TemporaryDirectory() as name:
        scale = (SCALES | {"XL": XL})[args.scale]
        config = make_config(Path(name), scale, args.scale, precision, args.overrides)
        plain = replace(config, guidance=replace(config.guidance, scale=1.0))
        for way, (memory_format, mode) in modes(torch.cuda.is_available()).items():
            runtime: Any = start(config.runtime, MeshConfig(), seed=0)
            if mode is not None:
                runtime.compile = lambda fn, mode=mode: torch.compile(fn, mode=mode)
            if memory_format not in networks:
                made = make_networks(config, runtime)
                networks[memory_format] = [n.to(memory_format=memory_format) for n in made]
            rae, model, _ = networks[memory_format]
            ways[way] = our_way(ImageSampler(plain, runtime, rae, model))
    first = ways["as it is"]
    for way, images in ways.items():  # this compiles, too
        difference = compare(images, first, args.batch_size)
        assert difference <= args.tolerance, f"{way}: pixels differ by up to {difference}"
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(args.rounds):
        for way in list(ways) if turn % 2 else reversed(ways):
            seconds[way].append(timed(ways[way], args.images, args.batch_size, runtime))
    print(f"{args.images} images in batches of {args.batch_size} on {runtime.description}")
    print(f"{'way':<40}{'images/s':>10}{'ratio':>8}")
    for way, own in seconds.items():
        ratio = statistics.median(map(operator.truediv, seconds["as it is"], own))
        print(f"{way:<40}{args.images / min(own):>10.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
