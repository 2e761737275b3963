"""Evaluate the results of the quickstart against real digits, in pixels, without pretrained nets.

    python scripts/quickstart/judge.py --images results/quickstart/images \
        --reconstructed results/quickstart/reconstructed \
        --generated "no guidance=results/quickstart/samples/plain.npz" \
        --out results/quickstart/judge.json

Metrics of the generated digits and, for comparison, of the same number of real training digits:

- accuracy: the share of digits that a support vector machine, trained on the real training digits,
  classifies as the requested class.
- frechet: Fréchet distance between Gaussians fitted to raw pixels, to the test split. (The FID
  formula of Heusel et al. 2017, on pixels in [0, 1] instead of Inception features.)
- coverage: the share of real test digits with a generated one nearer than their own fifth nearest
  neighbour in the test split (Naeem et al. 2020).
- twins: the share of digits that have a neighbour of their class nearer than any two training
  digits of that class are to each other.
- copies: the share of digits that are nearer than that to a training digit.
- psnr: peak signal-to-noise ratio of the reconstructions of the test split in dB, mean over images.

All distances are Euclidean, on gray pixels in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from digits import read
from PIL import Image
from sklearn.metrics import pairwise_distances
from sklearn.svm import SVC

NEIGHBOUR = 5
# With this penalty an RBF machine classifies 99% of the test digits correctly (1.0: 98.6%).
SVM_PENALTY = 5.0


def flatten(images: np.ndarray) -> np.ndarray:
    """Turn uint8 images (N, H, W, 3) into gray pixel vectors (N, H * W) in [0, 1]."""
    return images.mean(axis=-1).reshape(len(images), -1) / 255


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to the rows of two arrays (N, D).

    The formula's trace of (A^1/2 B A^1/2)^1/2 is the sum of the singular values of X Yᵀ, where
    A = XᵀX and B = YᵀY are the covariances: exact, and no root of a D x D matrix that is singular
    because there are fewer digits than pixels.
    """
    mean_one, mean_other = one.mean(0), other.mean(0)
    x = (one - mean_one) / np.sqrt(len(one) - 1)
    y = (other - mean_other) / np.sqrt(len(other) - 1)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    squared = np.square(mean_one - mean_other).sum() + np.square(x).sum() + np.square(y).sum()
    return float(max(squared - 2 * cross, 0.0))


def coverage(real: np.ndarray, generated: np.ndarray, neighbour: int = NEIGHBOUR) -> float:
    """Return the share of ``real`` rows with a generated one inside their neighbourhood."""
    # Column 0 is each digit's distance to itself.
    radius = np.sort(pairwise_distances(real), axis=1)[:, neighbour]
    return float((pairwise_distances(real, generated).min(axis=1) < radius).mean())


def closest_pairs(pixels: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Return, for each class, the distance between its two most similar members."""
    closest = {}
    for label in np.unique(labels):
        distances = pairwise_distances(pixels[labels == label])
        np.fill_diagonal(distances, np.inf)
        closest[int(label)] = float(distances.min())
    return closest


def share_near(
    pixels: np.ndarray,
    labels: np.ndarray,
    others: np.ndarray,
    other_labels: np.ndarray,
    closest: Mapping[int, float],
    *,
    same_set: bool = False,
) -> float:
    """Return the share of rows with one of ``others``, of their class, nearer than ``closest``."""
    near = 0
    for label, limit in closest.items():
        mine, theirs = pixels[labels == label], others[other_labels == label]
        if not (len(mine) and len(theirs)):
            continue
        distances = pairwise_distances(mine, theirs)
        if same_set:
            np.fill_diagonal(distances, np.inf)
        near += int((distances.min(axis=1) < limit).sum())
    return near / len(pixels)


@dataclass(frozen=True)
class Verdict:
    """One row of the table; the docstring of the module defines each number."""

    name: str
    count: int
    accuracy: float | None
    frechet: float
    coverage: float
    twins: float
    copies: float | None


@dataclass(frozen=True)
class Judge:
    """The real digits, flattened, and the classifier fitted to the training split."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    machine: SVC
    closest: dict[int, float]

    @classmethod
    def learn(
        cls,
        train: np.ndarray,
        train_labels: np.ndarray,
        test: np.ndarray,
        test_labels: np.ndarray,
    ) -> Judge:
        """Fit the machine to uint8 training images (N, H, W, 3)."""
        train, test = flatten(train), flatten(test)
        machine = SVC(C=SVM_PENALTY).fit(train, train_labels)
        closest = closest_pairs(train, train_labels)
        return cls(train, train_labels, test, test_labels, machine, closest)

    def accuracy_on_test(self) -> float:
        """Return the accuracy of the machine on the real test digits."""
        return float(self.machine.score(self.test, self.test_labels))

    def judge(self, name: str, images: np.ndarray, labels: np.ndarray) -> Verdict:
        """Evaluate generated uint8 images (N, H, W, 3) of the requested ``labels`` (N,)."""
        pixels = flatten(images)
        train = (self.train, self.train_labels)
        return Verdict(
            name=name,
            count=len(pixels),
            accuracy=float((self.machine.predict(pixels) == labels).mean()),
            frechet=frechet_distance(pixels, self.test),
            coverage=coverage(self.test, pixels),
            twins=share_near(pixels, labels, pixels, labels, self.closest, same_set=True),
            copies=share_near(pixels, labels, *train, self.closest),
        )

    def judge_training_digits(self, count: int | None = None, seed: int = 0) -> Verdict:
        """Evaluate ``count`` random training digits, or all of them (None).

        Accuracy and copies are left out: the machine was trained on these digits, and each is its
        own copy.
        """
        rows = np.random.default_rng(seed).permutation(len(self.train))[:count]
        pixels, labels = self.train[rows], self.train_labels[rows]
        return Verdict(
            name="real training digits",
            count=len(rows),
            accuracy=None,
            frechet=frechet_distance(pixels, self.test),
            coverage=coverage(self.test, pixels),
            twins=share_near(pixels, labels, pixels, labels, self.closest, same_set=True),
            copies=None,
        )


def psnr(real: np.ndarray, reconstructed: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio in dB of each pair of uint8 images (N, H, W, 3)."""
    error = np.square(real.astype(np.float64) - reconstructed).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / error.clip(1e-10))


def read_reconstructions(real: Path, reconstructed: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read each real image below ``real`` and the image of the same relative path.

    Raises:
        FileNotFoundError: If a reconstruction is missing.
    """
    names = sorted(path.relative_to(real) for path in real.glob("*/*.png"))

    def stack(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])

    return stack(real), stack(reconstructed)


def read_generated(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an .npz of `rae-xla sample`: ``arr_0`` are the images, ``labels`` the requested classes.

    Raises:
        KeyError: If the file contains no labels.
    """
    with np.load(path) as arrays:
        if "labels" not in arrays:
            raise KeyError(f"{path} contains no labels: is it a sample set of rae-xla?")
        return arrays["arr_0"], arrays["labels"]


def table(verdicts: list[Verdict]) -> str:
    """Format the verdicts as a table for a terminal."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    head = ("", "digits", "SVM accuracy", "Fréchet", "coverage", "twins", "copies")
    rows = [
        (
            v.name,
            f"{v.count:,}",
            percent(v.accuracy),
            f"{v.frechet:.2f}",
            percent(v.coverage),
            percent(v.twins),
            percent(v.copies),
        )
        for v in verdicts
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Judge generated digits against real ones.")
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--reconstructed", type=Path, help="reconstructions of the test split")
    parser.add_argument(
        "--generated", action="append", default=[], metavar="NAME=FILE.npz", help="repeatable"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSON file; the table is written to a .txt file of the same name",
    )
    args = parser.parse_args()

    judge = Judge.learn(*read(args.images / "train"), *read(args.images / "test"))
    verdicts = [judge.judge_training_digits()]
    sizes = set()
    for named in args.generated:
        name, _, path = named.rpartition("=")
        images, labels = read_generated(Path(path))
        sizes.add(len(images))
        verdicts.append(judge.judge(name or Path(path).stem, images, labels))
    # The Fréchet distance and the coverage depend on the number of images: compare like with like.
    verdicts[1:1] = [judge.judge_training_digits(size) for size in sorted(sizes)]

    result: dict[str, object] = {"accuracy_on_test": judge.accuracy_on_test()}
    if args.reconstructed:
        values = psnr(*read_reconstructions(args.images / "test", args.reconstructed))
        result["psnr"] = float(values.mean())
    result["rows"] = [asdict(verdict) for verdict in verdicts]
    lines = [f"The support vector machine on real test digits: {judge.accuracy_on_test():.1%}"]
    if "psnr" in result:
        lines.insert(0, f"Reconstruction of the test split: {result['psnr']:.2f} dB PSNR")
    text = "\n".join((*lines, "", table(verdicts)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".txt").write_text(text + "\n")
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
