"""Pretrain the encoder of the text-to-image quickstart: a small DINOv2 with registers for emoji.

A representation autoencoder starts from a frozen, pretrained encoder, and none is published for
64-pixel images. Like ``scripts/quickstart/pretrain_encoder.py``, on the training images only and
saved as an ordinary Hugging Face folder, with two objectives on the same patch tokens:

- masked reconstruction: some patches are replaced by the mask token, noise is added to the output
  tokens, and a linear head must reconstruct the complete image;
- classification: linear heads on the mean token predict concept, style and background. Their
  weights are small: the latents must keep the pixels first of all.

    python scripts/quickstart_t2i/pretrain_emoji_encoder.py --images results/quickstart_t2i/images \
        --out results/quickstart_t2i/encoder
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_images import BACKGROUNDS, IMAGE_SIZE, Sprites, over, read_sprites
from torch import Tensor, nn
from transformers import Dinov2WithRegistersModel

from rae_xla.progress import progress_bar

sys.path.append(str(Path(__file__).parents[1] / "quickstart"))
from pretrain_encoder import PIXEL_MEAN, PIXEL_STD, REGISTERS, build_encoder, patches_of, save

PATCH_SIZE = 16
LOSS_WEIGHTS = {"concept": 0.05, "style": 0.05, "background": 0.02}


def build(image_size: int = IMAGE_SIZE) -> Dinov2WithRegistersModel:
    """Return an untrained encoder."""
    return build_encoder(
        image_size, patch_size=PATCH_SIZE, hidden_size=96, depth=4, heads=4, mlp_ratio=4
    )


class Objectives(nn.Module):
    """The linear heads, which are discarded after pretraining.

    Args:
        hidden_size: channels of a token.
        classes: number of classes of each attribute.
    """

    def __init__(self, hidden_size: int, classes: dict[str, int]) -> None:
        super().__init__()
        self.pixels = nn.Linear(hidden_size, 3 * PATCH_SIZE**2)
        self.classes = nn.ModuleDict(
            {name: nn.Linear(hidden_size, count) for name, count in classes.items()}
        )

    def forward(self, tokens: Tensor, noise: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Map tokens (B, N, C) to patches (B, N, 3 * 16 * 16) and the logits of each attribute."""
        tokens = tokens + noise * torch.rand(len(tokens), 1, 1) * torch.randn_like(tokens)
        mean = tokens.mean(1)
        return self.pixels(tokens), {name: head(mean) for name, head in self.classes.items()}


def training_images(sprites: Sprites) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training images (N, 3, H, W), normalised, and the number of each attribute."""
    rows = np.flatnonzero(~sprites.held_out)
    images = np.stack([over(sprites.pixels[i], c) for i in rows for c in BACKGROUNDS.values()])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    count = len(BACKGROUNDS)
    labels = {
        "concept": torch.from_numpy(sprites.concepts[rows]).repeat_interleave(count),
        "style": torch.from_numpy(sprites.styles[rows]).repeat_interleave(count),
        "background": torch.arange(count).repeat(len(rows)),
    }
    return (pixels - PIXEL_MEAN) / PIXEL_STD, labels


def pretrain(
    pixels: Tensor,
    labels: dict[str, Tensor],
    *,
    steps: int = 1200,
    batch_size: int = 64,
    lr: float = 2e-3,
    mask_ratio: float = 0.25,
    noise: float = 0.4,
    quiet: bool = False,
) -> Dinov2WithRegistersModel:
    """Train an encoder on normalised images (N, 3, H, W) and their attributes (N,).

    ``noise`` is the largest standard deviation added to the unit-variance tokens; ``mask_ratio``
    the largest share of masked patches.
    """
    encoder = build(pixels.shape[-1])
    classes = {name: int(values.max()) + 1 for name, values in labels.items()}
    heads = Objectives(encoder.config.hidden_size, classes)
    parameters = [p for p in (*encoder.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    encoder.train()
    progress = progress_bar(range(steps), desc="pretrain encoder", disable=quiet)
    for _ in progress:
        rows = torch.randint(0, len(pixels), (batch_size,))
        target = patches_of(pixels[rows], PATCH_SIZE)
        masked = torch.rand(target.shape[:2]) < mask_ratio * torch.rand(batch_size, 1)
        output = encoder(pixels[rows], bool_masked_pos=masked).last_hidden_state
        predicted, logits = heads(output[:, 1 + REGISTERS :], noise)
        pixel_loss = F.l1_loss(predicted, target)
        class_losses = {n: F.cross_entropy(x, labels[n][rows]) for n, x in logits.items()}
        weighted = [LOSS_WEIGHTS[name] * loss for name, loss in class_losses.items()]
        optimizer.zero_grad()
        (pixel_loss + torch.stack(weighted).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        shown = {"pixels": f"{pixel_loss:.3f}", "concept": f"{class_losses['concept']:.2f}"}
        progress.set_postfix(shown, refresh=False)
    return encoder.eval()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Pretrain a small encoder on the emoji.")
    parser.add_argument("--images", type=Path, required=True, help="folder of emoji_images.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the encoder to")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    began = time.perf_counter()
    encoder = pretrain(*training_images(read_sprites(args.images)), steps=args.steps)
    save(encoder, args.out)
    count = sum(p.numel() for p in encoder.parameters())
    seconds = time.perf_counter() - began
    print(f"{args.out}: {count:,} parameters, {args.steps} steps in {seconds:.1f} s")


if __name__ == "__main__":
    main()
