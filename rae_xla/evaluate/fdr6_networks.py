"""The feature networks of FDr6 that are not Inception; see ``fdr6``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.evaluate.fdr6 import EXTRACTORS, Extractor
from rae_xla.evaluate.feature_networks import FeatureModule
from rae_xla.models.encoders.hf_vision import load_vision_model
from rae_xla.ops.resize import resize_bicubic_antialiased

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class ExtractorModule(FeatureModule):
    """A network of transformers as a feature network.

    Images are resized bicubically with antialiasing, without rounding, normalised, and padded with
    zeros to a multiple of the patch size, as timm does with ``dynamic_img_pad``.

    Args:
        extractor: which.
        network: of transformers, frozen.
        pooled: given its output, returns the features (B, D).
        statistics: mean and standard deviation per channel, of images in [0, 1].
        padded: side after padding.
        source: of the weights.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        extractor: Extractor,
        network: nn.Module,
        pooled: Callable[[Any], Tensor],
        statistics: Statistics,
        padded: int,
        source: str,
    ) -> None:
        super().__init__()
        self.extractor, self.network, self.pooled = extractor, network, pooled
        self.padding, self.source = padded - extractor.side, source
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in statistics)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the features (B, D) float32 of images (B, 3, H, W) uint8, by their name."""
        images = resize_bicubic_antialiased(pixels, self.extractor.side)
        images = (images - self.mean) / self.deviation
        images = F.pad(images, (0, self.padding, 0, self.padding))
        return {self.extractor.name: self.pooled(self.network(pixel_values=images))}


def load_extractor(extractor: Extractor, folder: str | None, without: str) -> ExtractorModule:
    """Load one of the networks from its folder.

    Args:
        extractor: which; not Inception.
        folder: in the layout of the hub; None: not configured.
        without: the option that omits the metric, for the error message.

    Raises:
        UserError: the folder is missing or contains another network.
    """
    key = f"weights.fdr6.{extractor.name}"
    advice = (
        f"run `hf download {extractor.hub_id} --local-dir models/{extractor.name}` and set "
        f"{key}=models/{extractor.name}, or omit the metric: {without}"
    )
    if folder is None:
        raise UserError(f"fdr6 needs {extractor.hub_id}, and {key} is not set: {advice}")
    try:
        module = _BUILDERS[extractor.name](extractor, folder)
    except (UserError, OSError) as error:
        raise UserError(f"fdr6 needs {extractor.hub_id} as {key}: {error}: {advice}") from error
    module.eval().requires_grad_(False)
    return module


def load_extractors(folders: Mapping[str, str | None], without: str) -> list[ExtractorModule]:
    """Load the five networks; see ``load_extractor``.

    Args:
        folders: by the name of the extractor.
        without: the option that omits the metric, for the error message.

    Raises:
        UserError: the first that cannot be loaded.
    """
    others = [extractor for extractor in EXTRACTORS if extractor.name != "inception"]
    return [load_extractor(e, folders.get(e.name), without) for e in others]


def _convnext(extractor: Extractor, folder: str) -> ExtractorModule:
    network = load_vision_model(folder)
    return ExtractorModule(
        extractor,
        network,
        lambda output: output.last_hidden_state.float().mean((2, 3)),
        _IMAGENET,
        extractor.side,
        folder,
    )


def _vit(
    extractor: Extractor,
    folder: str,
    statistics: Statistics,
    pooled: Callable[[Any], Tensor],
    **options: Any,
) -> ExtractorModule:
    network: Any = load_vision_model(folder, extractor.side, antialias=True, **options)
    padded = network.config.image_size
    return ExtractorModule(extractor, network, pooled, statistics, padded, folder)


def _class_token(output: Any) -> Tensor:
    tokens: Tensor = output.last_hidden_state
    return tokens[:, 0]


def _pooler_output(output: Any) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled


_BUILDERS: dict[str, Callable[[Extractor, str], ExtractorModule]] = {
    "convnext": _convnext,
    "dinov2": lambda e, folder: _vit(e, folder, _IMAGENET, _class_token),
    # timm's epsilon; transformers records 1e-12 for this model.
    "mae": lambda e, folder: _vit(
        e, folder, _IMAGENET, _class_token, changes={"layer_norm_eps": 1e-6}
    ),
    "siglip2": lambda e, folder: _vit(e, folder, _HALF, _pooler_output, head=True),
    # The published distance uses timm's model of this name, which has GELU where OpenAI trained
    # with QuickGELU. The class token is the one after the last norm, before the projection.
    "clip": lambda e, folder: _vit(
        e, folder, _CLIP, _pooler_output, changes={"hidden_act": "gelu"}
    ),
}
