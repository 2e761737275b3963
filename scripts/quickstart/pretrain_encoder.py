"""Pretrain the encoder of the quickstart: a tiny DINOv2 with registers for handwritten digits.

A representation autoencoder starts from a frozen, pretrained encoder. There is no published one for
32-pixel digits, so this script trains one in seconds, on the training digits only, and saves it as
an ordinary Hugging Face folder. The later steps use the folder as they would use
``facebook/dinov2-with-registers-base``.

Two objectives, both computed from the same patch tokens:

- masked reconstruction: some patches are replaced by the mask token, noise is added to the output
  tokens, and a linear head must reconstruct the complete image (so the latents keep the pixels, and
  nearby latents mean similar images);
- classification: a linear head on the mean token predicts the digit (unlike DINOv2, the pretraining
  is supervised; it replaces the semantics that DINOv2 learns from 142 million images).

    python scripts/quickstart/pretrain_encoder.py --images results/quickstart/images \
        --out results/quickstart/encoder
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import read
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from rae_xla.progress import progress_bar

PATCH_SIZE = 8
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5
# RAE drops the class token and exactly four register tokens, as in the published DINOv2 models.
REGISTERS = 4


def build_encoder(
    image_size: int,
    *,
    patch_size: int = PATCH_SIZE,
    hidden_size: int = 64,
    depth: int = 2,
    heads: int = 4,
    mlp_ratio: int = 2,
) -> Dinov2WithRegistersModel:
    """Return an untrained encoder whose final LayerNorm has a fixed identity affine part.

    RAE removes that affine part (``normalize=True``), so the objectives must not rely on it.
    """
    config = Dinov2WithRegistersConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        mlp_ratio=mlp_ratio,
        num_register_tokens=REGISTERS,
        # DINOv2 damps deep stacks with a small LayerScale; a few layers learn faster without.
        layerscale_value=1.0,
    )
    encoder = Dinov2WithRegistersModel(config)
    encoder.layernorm.requires_grad_(False)
    return encoder


class Objectives(nn.Module):
    """The two linear heads, which are discarded after pretraining."""

    def __init__(self, hidden_size: int, classes: int = 10) -> None:
        super().__init__()
        self.pixels = nn.Linear(hidden_size, 3 * PATCH_SIZE**2)
        self.classes = nn.Linear(hidden_size, classes)

    def forward(self, tokens: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Map tokens (B, N, C) to patches (B, N, 3 * 8 * 8) and class logits (B, 10)."""
        tokens = tokens + noise * torch.rand(len(tokens), 1, 1) * torch.randn_like(tokens)
        return self.pixels(tokens), self.classes(tokens.mean(1))


def patches_of(pixels: Tensor, size: int = PATCH_SIZE) -> Tensor:
    """Cut images (B, 3, H, W) into row-major patches (B, N, 3 * size * size)."""
    return F.unfold(pixels, size, stride=size).transpose(1, 2)


def shift(pixels: Tensor, most: int) -> Tensor:
    """Shift each image by up to ``most`` pixels; its edge is replicated."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (most,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * most + 1, (len(pixels), 2))
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, (top, left) in zip(padded, corners.tolist(), strict=True)
        ]
    )


def pretrain(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int = 600,
    batch_size: int = 64,
    lr: float = 2e-3,
    mask_ratio: float = 0.25,
    noise: float = 0.8,
    class_weight: float = 0.1,
    most_shift: int = 1,
    depth: int = 2,
    quiet: bool = False,
) -> Dinov2WithRegistersModel:
    """Train an encoder on ``images`` (N, 3, H, W) in [0, 1] and ``labels`` (N,).

    ``noise`` is the largest standard deviation added to the unit-variance tokens; ``mask_ratio``
    the largest share of masked patches.
    """
    pixels = (images - PIXEL_MEAN) / PIXEL_STD
    encoder = build_encoder(images.shape[-1], depth=depth)
    heads = Objectives(encoder.config.hidden_size)
    parameters = [p for p in (*encoder.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    encoder.train()
    progress = progress_bar(range(steps), desc="pretrain encoder", disable=quiet)
    for _ in progress:
        rows = torch.randint(0, len(pixels), (batch_size,))
        batch = shift(pixels[rows], most_shift)
        target = patches_of(batch)
        masked = torch.rand(target.shape[:2]) < mask_ratio * torch.rand(batch_size, 1)
        tokens = encoder(batch, bool_masked_pos=masked).last_hidden_state[:, 1 + REGISTERS :]
        predicted, logits = heads(tokens, noise)
        pixel_loss = F.l1_loss(predicted, target)
        class_loss = F.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        (pixel_loss + class_weight * class_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(pixels=f"{pixel_loss:.3f}", classes=f"{class_loss:.3f}", refresh=False)
    return encoder.eval()


def save(encoder: Dinov2WithRegistersModel, out: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``."""
    encoder.save_pretrained(out)
    size = encoder.config.image_size
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
        "resample": 3,
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Pretrain a tiny DINOv2-with-registers encoder.")
    parser.add_argument("--images", type=Path, required=True, help="folder written by digits.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the encoder to")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, labels = read(args.images / "train")
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    encoder = pretrain(
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        torch.from_numpy(labels),
        steps=args.steps,
    )
    save(encoder, args.out)
    count = sum(p.numel() for p in encoder.parameters())
    seconds = time.perf_counter() - began
    print(f"{args.out}: {count:,} parameters, {args.steps} steps in {seconds:.1f} s")


if __name__ == "__main__":
    main()
