"""Features of pictures by DINOv2, for a second opinion on their Fréchet distance."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluate.inception import FeatureModule
from rae_xla.models.encoders import DINOv2Encoder, image_mean_std
from rae_xla.models.resize import resize_bicubic
from rae_xla.models.vit_trunk import ViTTrunk
from rae_xla.sample.pictures import to_unit

DINO = "facebook/dinov2-with-registers-large"
SIDE = 224


class DinoFeatures(FeatureModule):
    """The class token of a DINOv2 with registers, after its final norm (Stein et al. 2023 measure
    with that of the ViT-L/14).

    Pictures are resized to 224 pixels a side as the RAE's encoder resizes (bicubic, not
    antialiased) and normalised with the model's own mean and deviation.

    Raises:
        UserError: if the folder is missing or holds another kind of model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        side = SIDE
        self.encoder = DINOv2Encoder(path, normalize=False, input_size=side)
        self.source = path
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in image_mean_std(path))
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """``dino`` (B, width) float32 of pictures (B, 3, H, W) uint8."""
        images = resize_bicubic(to_unit(pixels), SIDE)
        trunk = cast("ViTTrunk", self.encoder.get_submodule("encoder"))
        return {"dino": trunk((images - self.mean) / self.deviation)[:, 0]}


def load_dino(path: str | None, without: str) -> DinoFeatures:
    """The network with its weights, frozen.

    Args:
        path: local model folder or hub id; None for ``DINO``.
        without: the option that leaves its metric out, for the error.

    Raises:
        UserError: if it cannot be had.
    """
    try:
        return DinoFeatures(path or DINO)
    except UserError as error:
        raise UserError(
            f"the second opinion needs DINOv2 with registers: {error}. Give a folder as "
            f"weights.dinov2=FOLDER, or leave the metric out: {without}"
        ) from error
