"""Evaluate the results of the text-to-image quickstart with a small network trained on real emoji.

    python scripts/quickstart_t2i/emoji_judge.py train --images results/quickstart_t2i/images \
        --out results/quickstart_t2i/judge.pt
    python scripts/quickstart_t2i/emoji_judge.py judge --results results/quickstart_t2i \
        --out results/quickstart_t2i/judge.json

Metrics of real, reconstructed and generated emoji:

- concept, style: the share of images in which the network recognises what the prompt asks for. It
  was trained on renderings of all pairs, the held-out ones included, at other places and sizes, on
  backgrounds of any colour, and blurred.
- background: the share of images whose border is nearest to the requested colour.
- psnr: peak signal-to-noise ratio of reconstructions in dB, mean over images.
- copies: the share of generated images whose nearest training image, in pixels, is the very one
  that the prompt describes; ``psnr_to_training`` is the ratio to that image.
- psnr_between_draws: the ratio between two images of one prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_captions import STYLES
from emoji_images import BACKGROUNDS, Sprites, image_file, over, read_sprites
from emoji_prompts import HELD_OUT, TRAINED, UNSEEN, Prompt, read_prompts
from PIL import Image
from torch import Tensor, nn

from rae_xla.progress import progress_bar

SETS = (TRAINED, HELD_OUT, UNSEEN)
BORDER = 2
"""Pixels of the border that shows the background."""


class JudgeNetwork(nn.Module):
    """A convolutional network that recognises concept and style.

    Args:
        concepts: number of concepts.
        styles: number of styles.
    """

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers)
        self.concepts = nn.Linear(widths[-1], concepts)
        self.styles = nn.Linear(widths[-1], styles)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) in [0, 1] to the logits of concept and style."""
        features = self.features(pixels - 0.5).mean((2, 3))
        return self.concepts(features), self.styles(features)


def augmented(sprites: Tensor, colours: Tensor) -> Tensor:
    """Return premultiplied sprites (B, 4, H, W) on random backgrounds as images (B, 3, H, W).

    They are shifted, scaled, and half of them blurred, as decoded images are. A third has one of
    ``colours`` (N, 3) as background, the others any colour.
    """
    count, size = len(sprites), sprites.shape[-1]
    scale = 1 / (0.85 + 0.25 * torch.rand(count))
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = scale
    transform[:, :, 2] = (torch.rand(count, 2) - 0.5) * (8 / size)
    grid = F.affine_grid(transform, list(sprites.shape), align_corners=False)
    moved = F.grid_sample(sprites, grid, align_corners=False)
    chosen = colours[torch.randint(len(colours), (count,))]
    background = torch.where(torch.rand(count, 1) < 1 / 3, chosen, torch.rand(count, 3))
    images = moved[:, :3] + (1 - moved[:, 3:]) * background[..., None, None]
    blurred = F.avg_pool2d(F.pad(images, (2,) * 4, mode="replicate"), 5, stride=1)
    share = (torch.rand(count) * (torch.rand(count) < 0.5))[:, None, None, None]
    noise = 0.03 * torch.rand(count, 1, 1, 1) * torch.randn_like(images)
    return ((1 - share) * images + share * blurred + noise).clamp(0, 1)


def train(
    sprites: Sprites, *, steps: int = 600, batch_size: int = 64, quiet: bool = False
) -> JudgeNetwork:
    """Train the network on renderings of all sprites."""
    pixels = torch.from_numpy(sprites.pixels).permute(0, 3, 1, 2)
    concepts, styles = torch.from_numpy(sprites.concepts), torch.from_numpy(sprites.styles)
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    network = JudgeNetwork(len(sprites.concept_names), len(STYLES))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    progress = progress_bar(range(steps), desc="train the judge", disable=quiet)
    for _ in progress:
        rows = torch.randint(len(pixels), (batch_size,))
        concept, style = network(augmented(pixels[rows], colours))
        loss = F.cross_entropy(concept, concepts[rows]) + F.cross_entropy(style, styles[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return network.eval()


def save(network: JudgeNetwork, out: Path) -> None:
    """Write the weights, the file last of all."""
    sizes = {"concepts": network.concepts.out_features, "styles": network.styles.out_features}
    torch.save({"sizes": sizes, "state": network.state_dict()}, out)


def load(path: Path) -> JudgeNetwork:
    """Read what :func:`save` wrote."""
    saved = torch.load(path, weights_only=True)
    network = JudgeNetwork(**saved["sizes"])
    network.load_state_dict(saved["state"])
    return network.eval()


@torch.no_grad()
def recognise(network: JudgeNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of concept and style of uint8 images (N, H, W, 3)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    parts = [network(part) for part in pixels.split(256)]
    concept, style = (torch.cat([part[i] for part in parts]).argmax(1).numpy() for i in (0, 1))
    return concept, style


def background_of(images: np.ndarray) -> np.ndarray:
    """Return the number of the background nearest to the border of uint8 images (N, H, W, 3)."""
    inner = np.zeros(images.shape[1:3], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    border = np.median(images[:, ~inner], axis=1)
    colours = np.array(list(BACKGROUNDS.values()))
    return np.square(border[:, None] - colours).sum(-1).argmin(1)


def psnr(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio in dB of each pair of uint8 images (N, H, W, 3)."""
    error = np.square(one.astype(np.float64) - other).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / error.clip(1e-10))


@dataclass(frozen=True)
class Verdict:
    """One row of the table; the docstring of the module defines each number."""

    name: str
    count: int
    concept: float
    style: float
    background: float | None = None
    psnr: float | None = None
    copies: float | None = None
    psnr_to_training: float | None = None


@dataclass(frozen=True)
class Judge:
    """The network, and the real images that prompts are compared with.

    Attributes:
        network: trained.
        sprites: all emoji.
        training: (N, H, W, 3) uint8, the training images.
        described: number of the training image of each (concept, style, background).
    """

    network: JudgeNetwork
    sprites: Sprites
    training: np.ndarray
    described: dict[tuple[int, int, int], int]

    @classmethod
    def open(cls, network: JudgeNetwork, sprites: Sprites) -> Judge:
        """Draw the training images."""
        images, described = [], {}
        for row in np.flatnonzero(~sprites.held_out):
            for number, colour in enumerate(BACKGROUNDS.values()):
                key = (int(sprites.concepts[row]), int(sprites.styles[row]), number)
                described[key] = len(images)
                images.append(over(sprites.pixels[row], colour))
        return cls(network, sprites, np.stack(images), described)

    def numbers(self, prompt: Prompt) -> tuple[int, int, int]:
        """Return the numbers of concept, style and background that a prompt asks for."""
        return (
            self.sprites.concept_names.index(prompt.concept),
            list(STYLES).index(prompt.style),
            list(BACKGROUNDS).index(prompt.background),
        )

    def judge(
        self, name: str, images: np.ndarray, asked: np.ndarray, real: np.ndarray | None = None
    ) -> Verdict:
        """Evaluate uint8 images (N, H, W, 3).

        Args:
            name: of the row.
            images: to evaluate.
            asked: (N, 3) numbers of concept, style and background.
            real: the images that they reconstruct, if they do.
        """
        concept, style = recognise(self.network, images)
        rows = [self.described.get((int(c), int(s), int(b))) for c, s, b in asked]
        copies = to_training = None
        if real is None and None not in rows:
            nearest = nearest_rows(images, self.training)
            copies = float((nearest == np.array(rows)).mean())
            to_training = float(psnr(images, self.training[np.array(rows, int)]).mean())
        return Verdict(
            name,
            len(images),
            float((concept == asked[:, 0]).mean()),
            float((style == asked[:, 1]).mean()),
            float((background_of(images) == asked[:, 2]).mean()),
            None if real is None else float(psnr(real, images).mean()),
            copies,
            to_training,
        )

    def judge_renderings(self, count: int = 600, seed: int = 1) -> Verdict:
        """Evaluate new renderings of real emoji, moved and blurred as in the training."""
        torch.manual_seed(seed)
        rows = torch.randint(len(self.sprites.pixels), (count,))
        sprites = torch.from_numpy(self.sprites.pixels).permute(0, 3, 1, 2)[rows]
        images = augmented(sprites, torch.tensor(list(BACKGROUNDS.values())) / 255)
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).numpy()
        concept, style = recognise(self.network, pixels)
        return Verdict(
            "real, moved and blurred",
            count,
            float((concept == self.sprites.concepts[rows.numpy()]).mean()),
            float((style == self.sprites.styles[rows.numpy()]).mean()),
        )


def nearest_rows(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the row of the nearest of ``others`` for each image, in pixels."""
    a = torch.from_numpy(images.reshape(len(images), -1)).float()
    b = torch.from_numpy(others.reshape(len(others), -1)).float()
    nearest: np.ndarray = torch.cdist(a, b).argmin(1).numpy()
    return nearest


def read_generated(folder: Path) -> np.ndarray:
    """Return the images (N, H, W, 3) of a folder of ``rae-xla generate``, in its order."""
    entries = json.loads((folder / "generated.json").read_text())["pictures"]
    return np.stack([np.asarray(Image.open(folder / e["file"]).convert("RGB")) for e in entries])


def read_reconstructed(
    folder: Path, sprites: Sprites, held_out: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return real images, their reconstructions, and the numbers (N, 3) of what they show."""
    real, decoded, asked = [], [], []
    for row in np.flatnonzero(sprites.held_out == held_out):
        concept, style = int(sprites.concepts[row]), int(sprites.styles[row])
        for number, (name, colour) in enumerate(BACKGROUNDS.items()):
            file = image_file(
                sprites.concept_names[concept], list(STYLES)[style], name, held_out
            ).relative_to("png")
            real.append(over(sprites.pixels[row], colour))
            decoded.append(np.asarray(Image.open(folder / file).convert("RGB")))
            asked.append((concept, style, number))
    return np.stack(real), np.stack(decoded), np.array(asked)


def judge_all(results: Path) -> dict[str, object]:
    """Evaluate everything in the results folder of the quickstart."""
    sprites = read_sprites(results / "images")
    judge = Judge.open(load(results / "judge.pt"), sprites)
    verdicts = [judge.judge_renderings()]
    for name, held_out in (("trained", False), ("held-out", True)):
        real, decoded, asked = read_reconstructed(results / "reconstructed", sprites, held_out)
        verdicts.append(judge.judge(f"reconstructed, {name} pairs", decoded, asked, real))
    prompts = read_prompts(results / "prompts" / "all.json")
    asked = np.array([judge.numbers(prompt) for prompt in prompts])
    images = read_generated(results / "generated" / "scale2")
    for kind in SETS:
        rows = [i for i, prompt in enumerate(prompts) if prompt.set == kind]
        verdicts.append(judge.judge(f"{kind}, guidance 2", images[rows], asked[rows]))
    few = read_prompts(results / "prompts" / "few.json")
    asked = np.array([judge.numbers(prompt) for prompt in few for _ in range(2)])
    between = {}
    for scale in (1, 3):
        images = read_generated(results / "generated" / f"scale{scale}")
        verdicts.append(judge.judge(f"{TRAINED}, guidance {scale}", images, asked))
        between[f"guidance {scale}"] = float(psnr(images[::2], images[1::2]).mean())
    return {"rows": [asdict(v) for v in verdicts], "psnr_between_draws": between}


def table(rows: Sequence[Mapping[str, float | str | None]]) -> list[tuple[str, ...]]:
    """Return the head and the rows of the table as text."""

    def percent(value: object) -> str:
        return f"{value:.1%}" if isinstance(value, float) else "-"

    def decibels(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else "-"

    head = ("", "images", "concept", "style", "background", "PSNR, dB", "copies")
    return [
        head,
        *(
            (
                str(row["name"]),
                f"{row['count']:,}",
                percent(row["concept"]),
                percent(row["style"]),
                percent(row["background"]),
                decibels(row["psnr"] if row["psnr"] is not None else row["psnr_to_training"]),
                percent(row["copies"]),
            )
            for row in rows
        ),
    ]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Format a table for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Judge generated emoji.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the network on real emoji")
    training.add_argument("--images", type=Path, required=True, help="folder of emoji_images.py")
    training.add_argument("--out", type=Path, required=True, help="file of weights")
    training.add_argument("--steps", type=int, default=600)
    training.add_argument("--seed", type=int, default=0)
    judging = commands.add_parser("judge", help="evaluate the results of the quickstart")
    judging.add_argument("--results", type=Path, required=True, help="folder of the quickstart")
    judging.add_argument(
        "--out", type=Path, required=True, help="JSON file; a .txt file gets the table"
    )
    args = parser.parse_args()
    if args.command == "train":
        torch.manual_seed(args.seed)
        save(train(read_sprites(args.images), steps=args.steps), args.out)
        return
    found = judge_all(args.results)
    rows = found["rows"]
    assert isinstance(rows, list)
    text = as_text(table(rows))
    args.out.with_suffix(".txt").write_text(text + "\n")
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
