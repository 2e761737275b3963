"""Requests to a bucket in an epoch of ImageNet, and the host memory of the read-ahead.

    python benchmarks/data_requests.py [--samples 1281167] [--bytes 110000] [--batch 1024]

The requests of the training loader are counted, not timed: for one worker of each layout (all are
alike), over one epoch of a data set of which only the index exists. A request is one GET.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from rae_xla.data.batch_builder import LOOK_AHEAD
from rae_xla.data.reader import ReadRequest, read_requests
from rae_xla.data.sampler import BatchSampler, block_size
from rae_xla.data.shards.index import SAMPLE, Shard, ShardIndex

LAYOUTS = ((1, 1), (1, 8), (8, 4), (8, 8), (16, 8), (64, 8))


def make_index(samples: int, size: int, per_shard: int = 1250) -> ShardIndex:
    """Return the index of non-existent shards with samples of about ``size`` bytes."""
    rng = np.random.default_rng(0)
    table = np.zeros(samples, SAMPLE)
    table["size"] = rng.lognormal(np.log(size) - 0.125, 0.5, samples)
    padded = table["size"] + 2048  # headers, label
    shards, ends = [], []
    for first in range(0, samples, per_shard):
        last = min(first + per_shard, samples)
        table["offset"][first:last] = np.cumsum(padded[first:last]) - padded[first:last]
        shards.append(Shard(f"{first}.tar", last - first, int(padded[first:last].sum()), ""))
        ends.append(last)
    return ShardIndex("nowhere", tuple(shards), ("0",), table)


def requests_by_step(
    index: ShardIndex, sampler: BatchSampler, first: int, last: int
) -> Iterator[list[ReadRequest]]:
    """Yield the new requests of each step of an epoch for rows ``first:last``."""
    ahead = -(-LOOK_AHEAD // (last - first))
    requested: dict[tuple[int, int, int], int] = {}
    for step in range(sampler.steps_per_epoch - ahead):
        new = []
        for window, samples in sampler.upcoming(step + ahead, first, last):
            if window not in requested:
                new += read_requests(index, samples)
            requested[window] = step
        requested = {w: until for w, until in requested.items() if until == step}
        yield new


def main() -> None:
    """Count the requests and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--bytes", type=int, default=110_000, help="average bytes of an image")
    parser.add_argument("--batch", type=int, default=1024, help="global batch")
    args = parser.parse_args()
    index = make_index(args.samples, args.bytes)
    block = block_size(len(index), index.num_bytes)
    sampler = BatchSampler(len(index), args.batch, 0, block)
    print(
        f"{len(index):,} images, {index.num_bytes / 1e9:.0f} GB, blocks of {block}, "
        f"batch {args.batch}"
    )
    print(f"{'hosts x workers':<16}{'requests':>10}{'GB read':>9}{'MB each':>9}{'GB per host':>14}")
    for hosts, workers in LAYOUTS:
        rows = args.batch // hosts // workers
        ahead = -(-LOOK_AHEAD // rows)
        total, size, held, most = 0, 0, 0, 0
        needed: dict[int, int] = {}  # bytes held, by sample
        for step, new in enumerate(requests_by_step(index, sampler, 0, rows)):
            for request in new:
                length = request.length
                total, size, held = total + 1, size + length, held + length
                needed |= dict.fromkeys(request.samples.tolist(), length // len(request.samples))
            held -= sum(needed.pop(i, 0) for i in sampler.sample_ids(step, 0, rows).tolist())
            if step > ahead:
                most = max(most, held)
        parts = hosts * workers
        print(
            f"{f'{hosts} x {workers}':<16}{total * parts:>10,}{size * parts / 1e9:>9.0f}"
            f"{size / total / 1e6:>9.2f}{most * workers / 1e9:>14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
