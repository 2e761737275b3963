"""Rows per second of images with captions on one core: ours, images alone, and webdataset.

    python benchmarks/data_captions.py [--seconds 8] [--rounds 3] [--images 512] [--small]

Everything runs on one core, with one worker process. The images are JPEGs of 500 x 375 pixels (with
``--small`` of 256 x 256 pixels, as `rae-xla shards make --image-size 256` writes them) in tars with
captions of 20 to 80 words. A row is an image cropped to 256 px and 512 tokens with their labels,
in the chat format, 256 of them for the image.

- images: our loader without the captions
- ours: our loader with the captions, tokenised in its worker
- reference: webdataset with a shuffle buffer, the same crop, and the fast tokenizer of
  transformers, in a DataLoader
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from rae_xla.data.captions import CaptionRows
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import CaptionedMixture, open_training_data
from rae_xla.data.shards.captioned import index_captioned
from rae_xla.data.transforms import CenterCrop

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from data import rate
from photographs import photograph
from tiny_captions import write_tar

SIZE, BATCH, LENGTH, TOKENS = 256, 64, 512, 256
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]
IGNORE, IMAGE_TOKEN = -100, -200
RATIOS = (("ours", "images"), ("ours", "reference"))
"""Pairs of measurements whose ratio is printed; the goals are 0.9 and 1.0."""


def write_data(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write tars of images with captions, and a tokenizer that was trained on the captions."""
    random.seed(0)
    words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9)))
             for _ in range(4000)]  # fmt: skip
    captions = [" ".join(random.choices(words, k=random.randint(20, 80))) for _ in range(count)]
    for first in range(0, count, 128):
        members: list[tuple[str, bytes]] = []
        for i in range(first, min(first + 128, count)):
            members.append((f"{i:06d}.jpg", photograph(i, size)))
            members.append((f"{i:06d}.txt", captions[i].encode()))
        write_tar(folder / f"tars/{first:06d}.tar", members)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(captions, trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))


def ours(folder: Path, with_captions: bool) -> Generator[int, None, None]:
    """Run our loader with one worker process."""
    data = open_training_data(str(folder / "index"))
    assert isinstance(data, CaptionedMixture)
    rows = CaptionRows(data.text_tables(), str(folder / "tokenizer"), TOKENS, LENGTH, seed=0)
    loader = TrainingLoader(
        data,
        seed=0,
        global_batch_size=BATCH,
        transform=CenterCrop(SIZE, fast=True),
        num_workers=1,
        row_arrays=rows if with_captions else None,
    )
    for batch in loader.batches():
        yield len(batch["image"])


class ReferenceRow:
    """Make a row from a sample of webdataset, with the fast tokenizer of transformers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer/tokenizer.json"), pad_token=SPECIAL[0]
        )
        self._crop = CenterCrop(SIZE, fast=True)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def __call__(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return image, ids and labels."""
        image: Image.Image = sample["jpg"]
        pixels = np.asarray(self._crop(image, (0.5, 0.5)))
        system = self._ids("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
        user = self._ids(f"<|im_start|>user\n{sample['txt']}<|im_end|>\n")
        before = self._ids("<|im_start|>assistant\n<im_start>")
        after = self._ids("<im_end><|im_end|>\n")
        ids = system + user + before + [IMAGE_TOKEN] * TOKENS + after
        hidden = [IGNORE] * (len(system) + len(user))
        labels = hidden + before + [IGNORE] * TOKENS + after
        ids, labels = ids[:LENGTH], labels[:LENGTH]
        missing = LENGTH - len(ids)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
            "ids": torch.tensor(ids + [self._tokenizer.pad_token_id] * missing),
            "labels": torch.tensor(labels + [IGNORE] * missing),
        }


def reference(folder: Path) -> Iterator[int]:
    """Run webdataset in a DataLoader with one worker, without end."""
    tars = sorted(map(str, (folder / "tars").glob("*.tar")))
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
        .repeat()
        .shuffle(256)
        .decode("pil")
        .map(ReferenceRow(folder))
    )
    for batch in DataLoader(samples, batch_size=BATCH, num_workers=1):
        yield len(batch["image"])


def main() -> None:
    """Create the data, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each")
    parser.add_argument("--images", type=int, default=512, help="number of different images")
    parser.add_argument("--small", action="store_true", help="images of 256 x 256 pixels")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.images, (256, 256) if args.small else (500, 375))
        index_captioned(str(folder / "tars"), str(folder / "index"))
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        rates: dict[str, list[float]] = {}

        def measure(name: str, batches: Any) -> None:
            with closing(batches):
                rates.setdefault(name, []).append(rate(batches, args.seconds, 3))

        # Interleaved, because the speed of a shared machine changes during the run.
        for _ in range(args.rounds):
            measure("images", ours(folder, with_captions=False))
            measure("ours", ours(folder, with_captions=True))
            measure("reference", reference(folder))
        for name, several in rates.items():
            print(f"{name:<12}{statistics.median(several):>8,.0f} rows/s")
        for name, against in RATIOS:
            pairs = zip(rates[name], rates[against], strict=True)
            print(f"{name:<12}{statistics.median(a / b for a, b in pairs):>8.2f} x {against}")


if __name__ == "__main__":
    main()
