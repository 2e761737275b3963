"""Throughput of the training loader on one core, compared with decoding alone and with torch.

    python benchmarks/data.py [--seconds 8] [--rounds 3] [--images 512]

Everything measured runs on one core, with one worker process; the storage server of the last two
rows uses another core. The images are JPEGs of 500 x 375 pixels, about 100 kB each, and the same
images resized to 256 px. Both are repeated in the index until the data set has the size of
ImageNet, and read as by one of 16 hosts that train with a global batch of 1,024.

- limit: decode and crop to 256 px, from memory, and nothing else
- reference: ImageFolder, ADM's centre crop, flip and ToTensor in a DataLoader, as published
- ours: shards of the same files on disk; of files at 256 px; in a bucket; in a bucket with a
  latency of 50 ms
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from rae_xla.data.loader import TrainingLoader
from rae_xla.data.reader import SampleReader
from rae_xla.data.shards.encoding import Encoding
from rae_xla.data.shards.index import ShardIndex, open_index
from rae_xla.data.shards.sources.folder import folder_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.data.transforms import CenterCrop, center_crop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from gcs_emulator import GcsEmulator
from photographs import photograph

RATIOS = (
    ("reference", "limit"),
    ("ours, from disk", "limit"),
    ("ours, from disk", "reference"),
    ("ours, from disk at 256 px", "reference"),
    ("ours, from a bucket", "ours, from disk"),
    ("ours, from 50 ms away", "ours, from a bucket"),
)
"""Pairs of measurements whose ratio is printed."""

SIZE, BATCH, HOSTS, IMAGENET = 256, 1024, 16, 1_281_167
CLASSES = 8


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` images to a folder per class."""
    for number in range(count):
        path = folder / f"{number % CLASSES:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(number, (500, 375)))


def as_imagenet(index: ShardIndex) -> ShardIndex:
    """Repeat the samples until there are as many as in ImageNet."""
    copies = -(-IMAGENET // len(index))
    return replace(index, shards=index.shards * copies, samples=np.tile(index.samples, copies))


def rate(batches: Iterator[int], seconds: float, warm_up: float) -> float:
    """Return images per second, after a warm-up, of an iterator that yields numbers of images."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_up:
        next(batches)
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        done += next(batches)
    return done / (time.perf_counter() - begin)


def decoding_alone(index: ShardIndex, count: int) -> Generator[int, None, None]:
    """Decode and crop images from memory."""
    encoded = [bytes(SampleReader(index).encoded(0, i)) for i in range(min(count, len(index)))]
    crop = CenterCrop(SIZE, fast=True)
    while True:
        for content in encoded:
            with Image.open(io.BytesIO(content)) as image:
                crop(image, (0, 0))
            yield 1


def reference(folder: Path) -> Generator[int, None, None]:
    """Run the published loader without end."""
    transform = transforms.Compose(
        [
            transforms.Lambda(partial(adm_crop, size=SIZE)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder), transform),
        batch_size=BATCH // HOSTS,
        shuffle=True,
        num_workers=1,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the exact centre crop of ADM."""
    return Image.fromarray(center_crop(image, size))


def ours(index: ShardIndex) -> Generator[int, None, None]:
    """Run the training loader of one of the hosts, with one worker process."""
    loader = TrainingLoader(
        as_imagenet(index),
        seed=0,
        global_batch_size=BATCH,
        transform=CenterCrop(SIZE, fast=True),
        process_count=HOSTS,
        num_workers=1,
        flip=True,
    )
    for batch in loader.batches():
        yield len(batch["label"])


def largest_difference(index: ShardIndex, count: int = 64) -> tuple[int, float]:
    """Return the largest and the mean difference (of 255) of the fast crop from the exact one."""
    reader, differences = SampleReader(index), []
    for sample in range(count):
        fast = reader.load(0, sample, CenterCrop(SIZE, fast=True), (0, 0))
        exact = reader.load(0, sample, CenterCrop(SIZE), (0, 0))
        differences.append(np.abs(fast.astype(int) - exact))
    return int(np.max(differences)), float(np.mean(differences))


def main() -> None:
    """Create the data, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each")
    parser.add_argument("--images", type=int, default=512, help="number of different images")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, GcsEmulator() as server:
        os.environ |= server.environment()
        server.create_bucket("shards")
        folder = Path(name)
        write_images(folder / "images", args.images)
        originals = write_shards(folder_source(str(folder / "images")), str(folder / "originals"))
        resized = folder_source(str(folder / "images"), encoding=Encoding(SIZE, quality=90))
        small = write_shards(resized, str(folder / "small"))
        write_shards(folder_source(str(folder / "images")), "gs://shards/originals")
        bucket = open_index("gs://shards/originals")
        average = originals.num_bytes / len(originals) / 1000
        print(
            f"{args.images} JPEGs of {average:.0f} kB; at 256 px "
            f"{small.num_bytes / len(small) / 1000:.0f} kB; one core of {len(cores)}"
        )
        largest, mean = largest_difference(originals)
        print(f"fast crop against ADM's, of 255: at most {largest}, on average {mean:.5f}")

        os.sched_setaffinity(0, cores[:1])  # for what is measured, and its worker
        os.sched_setaffinity(server.pid, cores[-1:])
        rates: dict[str, list[float]] = {}

        def measure(name: str, batches: Generator[int, None, None], warm_up: float = 3) -> None:
            with closing(batches):
                rates.setdefault(name, []).append(rate(batches, args.seconds, warm_up))

        # Interleaved, because the speed of a shared machine changes during the run.
        for _ in range(args.rounds):
            measure("limit", decoding_alone(originals, 512))
            measure("reference", reference(folder / "images"))
            measure("ours, from disk", ours(originals))
            measure("ours, from disk at 256 px", ours(small))
            measure("ours, from a bucket", ours(bucket), 12)
            server.set_latency(0.05)
            measure("ours, from 50 ms away", ours(bucket), 12)
            server.set_latency(0)
        for name, several in rates.items():
            print(f"{name:<28}{statistics.median(several):>8,.0f} images/s")
        for name, against in RATIOS:
            pairs = zip(rates[name], rates[against], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
            print(f"{name:<28}{ratio:>8.2f} x {against}")


if __name__ == "__main__":
    main()
