"""Compare images per second of the sampler by memory format and mode of torch.compile.

    python benchmarks/sampling_modes.py [--scale digits|S|XL] [--images N] [--batch-size N]

All modes get the same networks, noise and settings, without guidance: eager with contiguous
tensors, channels last, compiled by torch's default, and with `max-autotune`; on a GPU also with
CUDA graphs (`reduce-overhead`). All modes run in every round; a ratio is the median over rounds of
a mode's speed to that of the first. On a CPU, the time is processor time.
"""

from __future__ import annotations

import operator
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sampling import XL, batched_sampler, compare, make_config, make_networks, read_arguments, timed
from world import SCALES

from rae_xla.config.schema import MeshConfig
from rae_xla.runtime import start
from rae_xla.sample.sampler import ImageSampler


def modes(on_gpu: bool) -> dict[str, tuple[torch.memory_format, str | None]]:
    """Return memory format and mode of torch.compile (None: not compiled), by name."""
    plain, last = torch.contiguous_format, torch.channels_last
    tuned = "max-autotune" if on_gpu else "max-autotune-no-cudagraphs"
    formats: dict[str, tuple[torch.memory_format, str | None]] = {
        "eager": (plain, None),
        "channels last": (last, None),
        "compiled": (plain, "default"),
        "compiled, channels last": (last, "default"),
        f"compiled, {tuned}": (plain, tuned),
    }
    return formats | ({"compiled, CUDA graphs": (plain, "reduce-overhead")} if on_gpu else {})


def main() -> None:
    """Build the samplers, warm up, run the rounds and print a table."""
    args = read_arguments()
    precision = "bf16" if args.scale == "XL" else "fp32"
    samplers: dict[str, Any] = {}
    networks: dict[torch.memory_format, Any] = {}  # shared by the modes of one format
    with tempfile.TemporaryDirectory() as name:
        scale = (SCALES | {"XL": XL})[args.scale]
        config = make_config(Path(name), scale, args.scale, precision, args.overrides)
        plain = replace(config, guidance=replace(config.guidance, scale=1.0))
        for label, (memory_format, mode) in modes(torch.cuda.is_available()).items():
            backend: Any = start(config.runtime, MeshConfig(), seed=0)
            if mode is not None:
                backend.compile = lambda fn, mode=mode: torch.compile(fn, mode=mode)
            if memory_format not in networks:
                built = make_networks(config, backend)
                networks[memory_format] = [n.to(memory_format=memory_format) for n in built]
            rae, model, _ = networks[memory_format]
            samplers[label] = batched_sampler(ImageSampler(plain, backend, rae, model))
    first = samplers["eager"]
    for label, sample in samplers.items():  # this also compiles
        difference = compare(sample, first, args.batch_size)
        assert difference <= args.tolerance, f"{label}: pixels differ by up to {difference}"
    seconds: dict[str, list[float]] = {label: [] for label in samplers}
    for number in range(args.rounds):
        for label in list(samplers) if number % 2 else reversed(samplers):
            seconds[label].append(timed(samplers[label], args.images, args.batch_size, backend))
    print(f"{args.images} images in batches of {args.batch_size} on {backend.description}")
    print(f"{'mode':<40}{'images/s':>10}{'ratio':>8}")
    for label, own in seconds.items():
        ratio = statistics.median(map(operator.truediv, seconds["eager"], own))
        print(f"{label:<40}{args.images / min(own):>10.2f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
