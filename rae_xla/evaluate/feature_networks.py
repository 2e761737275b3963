"""Feature networks: the interface of networks that map images to features, and DINOv2.

The Inception network is in :mod:`rae_xla.evaluate.inception`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.encoders.backbone import ViTBackbone
from rae_xla.models.encoders.frozen import DINOv2Encoder, read_image_statistics
from rae_xla.ops.resize import resize_bicubic
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import to_unit

DINO = "facebook/dinov2-with-registers-large"
"""Default DINOv2 on the Hugging Face hub."""

_DINO_SIDE = 224


class FeatureModule(nn.Module):
    """Base class: maps images (B, 3, H, W) uint8 to named features (B, D) float32.

    Attributes:
        source: where the weights come from, for reports.
    """

    source: str


class FeatureNetwork:
    """A ``FeatureModule`` that is placed on the devices, compiled and computed in float32."""

    def __init__(self, network: FeatureModule, backend: Backend) -> None:
        backend.place(network)
        self._backend = backend
        self.source = network.source

        @backend.compile
        def features(pixels: Tensor) -> Batch:
            with torch.no_grad():
                outputs: Batch = network(pixels)
            return outputs

        self._features = features

    def all(self, pixels: Tensor) -> Batch:
        """Return every feature (B, D), by name, of a chunk of images (B, 3, H, W) uint8."""
        with self._backend.full_float32():
            return self._features(pixels)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the ``pool`` features (B, 2048) of Inception for a chunk of images."""
        return self.all(pixels)["pool"]


class DinoFeatures(FeatureModule):
    """The class token of a DINOv2 with registers, after the final norm.

    Stein et al. (2023) use that of the ViT-L/14. Images are resized to 224 pixels a side as for
    the RAE's encoder (bicubic, without antialiasing) and normalised with the model's own mean and
    standard deviation.

    Args:
        path: local model folder or hub id.

    Raises:
        UserError: if the folder is missing or contains another kind of model.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, path: str) -> None:
        super().__init__()
        self.encoder = DINOv2Encoder(path, normalize=False, input_size=_DINO_SIDE)
        self.source = path
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in read_image_statistics(path))
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``dino`` (B, width) float32 of images (B, 3, H, W) uint8."""
        images = resize_bicubic(to_unit(pixels), _DINO_SIDE)
        backbone = cast("ViTBackbone", self.encoder.get_submodule("encoder"))
        return {"dino": backbone((images - self.mean) / self.deviation)[:, 0]}


def load_dino(path: str | None, without: str) -> DinoFeatures:
    """Load a DINOv2 with registers, frozen.

    Args:
        path: local model folder or hub id; None for ``DINO``.
        without: the option that omits the metric, for the error message.

    Raises:
        UserError: if it cannot be loaded.
    """
    try:
        return DinoFeatures(path or DINO)
    except UserError as error:
        raise UserError(
            f"fd_dinov2 needs DINOv2 with registers: {error}. Give a folder as "
            f"weights.dinov2=FOLDER, or omit the metric: {without}"
        ) from error
