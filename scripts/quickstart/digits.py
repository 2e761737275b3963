"""Write the handwritten digits of scikit-learn as an image folder: the real data of the quickstart.

The 1,797 digits (8x8 pixels, ink 0 to 16) are a copy of the test set of the UCI "Optical
Recognition of Handwritten Digits" data; they ship with scikit-learn, so nothing is downloaded.
A fifth of each class is held out for testing and never trained on.

    python scripts/quickstart/digits.py --out results/quickstart/images

writes ``train/<digit>/<number>.png`` (1,437 images) and ``test/<digit>/<number>.png`` (360), where
``number`` is the index of the digit in the array of scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 32
MAX_INK = 16
TEST_SHARE = 0.2
SPLIT_SEED = 0


def render(ink: np.ndarray, size: int = IMAGE_SIZE) -> Image.Image:
    """Return one 8x8 digit (ink 0 to 16) as a ``size``-pixel RGB image, white on black.

    The enlargement is bicubic: smooth strokes instead of 8x8 blocks.
    """
    gray = np.round(ink * (255 / MAX_INK)).astype(np.uint8)
    return Image.fromarray(gray).resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


def split() -> dict[str, np.ndarray]:
    """Return the numbers of ``train`` and ``test`` digits: 80/20, stratified by class, fixed."""
    labels = load_digits().target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, random_state=SPLIT_SEED, stratify=labels
    )
    return {"train": np.sort(train), "test": np.sort(test)}


def write(out: Path, size: int = IMAGE_SIZE) -> dict[str, int]:
    """Write both splits below ``out`` and return how many images each one has."""
    digits = load_digits()
    counts = {}
    for name, numbers in split().items():
        for number in numbers:
            folder = out / name / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            render(digits.images[number], size).save(folder / f"{number:04d}.png")
        counts[name] = len(numbers)
    return counts


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read ``folder/<digit>/*.png``, sorted by path.

    Returns:
        Images (N, H, W, 3) uint8 and labels (N,) int64.

    Raises:
        FileNotFoundError: If the folder contains no such image.
    """
    paths = sorted(folder.glob("[0-9]/*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder} contains no <digit>/*.png: run digits.py --out first")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, np.array([int(path.parent.name) for path in paths])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Write the digits of scikit-learn as an image folder."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="image side in pixels")
    args = parser.parse_args()
    counts = write(args.out, args.size)
    print(f"{args.out}: {counts['train']:,} training digits, {counts['test']:,} test digits")


if __name__ == "__main__":
    main()
