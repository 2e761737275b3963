"""How fast the sample stream is, against decoding and cropping alone.

    python benchmarks/data_loading.py [--seconds 5]

Shards of small PNGs (32 px) and of JPEGs (256 px) are made from generated pictures, then read: by
a plain loop over images already in memory (the limit of one core), by the stream with its thread,
and with worker processes. The ratio is the stream's rate over that limit; with several cores,
workers pass 1.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from rae_xla.data.reader import read_image
from rae_xla.data.shards import ShardIndex, ShardSample, write_shards
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import CenterCrop


def pictures(count: int, size: int, kind: str) -> Iterator[ShardSample]:
    """Blurred noise, which compresses about as a photograph does."""
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(1)).save(buffer, kind, quality=90)
        yield ShardSample(buffer.getvalue(), "png" if kind == "PNG" else "jpg", number % 10)


def limit(index: ShardIndex, size: int, seconds: float) -> float:
    """Images per second of decode and crop alone, on one core, from memory."""
    encoded = [read_image(index, sample) for sample in range(min(len(index), 512))]
    crop, done, start = CenterCrop(size), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        with Image.open(io.BytesIO(encoded[done % len(encoded)])) as image:
            crop(image, (0, 0))
        done += 1
    return done / (time.perf_counter() - start)


def stream_rate(index: ShardIndex, size: int, workers: int, seconds: float) -> float:
    """Images per second of the stream once it runs, for a caller that does nothing else."""
    stream = SampleStream(
        index,
        seed=0,
        global_batch_size=64,
        transform=CenterCrop(size),
        num_workers=workers,
        flip=True,
    )
    batches = stream.batches()
    for _ in range(4):  # the workers start, and the batches made ahead are used up
        next(batches)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        done += len(next(batches)["label"])
    rate = done / (time.perf_counter() - start)
    batches.close()
    return rate


def main() -> None:
    """Print one line per kind of image and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; images/s, and the ratio to decode + crop on one core")
    with tempfile.TemporaryDirectory() as folder:
        for kind, size, count in (("PNG", 32, 4096), ("JPEG", 256, 1024)):
            index = write_shards(pictures(count, size, kind), os.path.join(folder, kind))
            most = limit(index, size, args.seconds)
            average = index.num_bytes / len(index) / 1000
            print(f"{size}-px {kind} ({average:.1f} kB): decode + crop alone {most:,.0f}")
            for workers in args.workers:
                rate = stream_rate(index, size, workers, args.seconds)
                print(f"  stream, {workers} workers: {rate:8,.0f}   ratio {rate / most:.2f}")


if __name__ == "__main__":
    main()
