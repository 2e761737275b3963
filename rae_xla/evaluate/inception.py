"""Inception: the feature network of published FID, sFID and Inception Score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.evaluate.feature_networks import FeatureModule
from rae_xla.models.weights import read_torch_file
from rae_xla.ops.dispatch import requires_static_graph

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17
CLASSES = 1008
SIDE = 299
LAST_SPATIAL_BLOCK = "Mixed_6d"
"""TensorFlow's ``mixed_6``, by the table torch-fidelity converted the weights with."""


class Inception(FeatureModule):
    """``inception-v3-compat`` of torch-fidelity, a port of the TensorFlow network of 2015.

    The layers are torch-fidelity's. Only the resize is ours: it uses matrix products instead of
    indexing, with bit-identical results.

    Args:
        extractor: torch-fidelity's network with its weights.
        source: where the weights come from, for reports.
    """

    def __init__(self, extractor: FeatureExtractorInceptionV3, source: str) -> None:
        super().__init__()
        # torch-fidelity declares its layers in the order in which it applies them
        layers = dict(extractor.named_children())
        self.classes = nn.Linear(FEATURES, CLASSES, bias=False)
        self.classes.weight = layers.pop("fc").weight
        names = list(layers)
        after = names.index(LAST_SPATIAL_BLOCK) + 1
        self.spatial = nn.Sequential(*(layers[name] for name in names[:after]))
        self.pool = nn.Sequential(*(layers[name] for name in names[after:]))
        self.source = source

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Compute features of images.

        Args:
            pixels: (B, 3, H, W) uint8.

        Returns:
            float32 features by name. ``pool`` (B, 2048), for FID, precision and recall.
            ``spatial`` (B, 2023), for sFID: the first 7 channels of the 17 x 17 map that
            TensorFlow calls ``mixed_6/conv``, channels last as in the moments of the ADM suite
            (Nash et al. 2021). ``logits`` (B, 1008), for the Inception Score: without their bias,
            as in torch-fidelity and the ADM suite.
        """
        images = resize_like_tensorflow1(pixels.float(), SIDE)
        maps = self.spatial((images - 128) / 128)
        pool = self.pool(maps).flatten(1)
        # the first channels of the block's output are those of its 1 x 1 convolution, mixed_6/conv
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": self.classes(pool)}


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize (..., H, W) to (..., size, size) as TensorFlow 1 did.

    Bilinear, with neither corners nor pixel centres aligned. On the CPU the result is bit-identical
    to torch-fidelity's ``interpolate_bilinear_2d_like_tensorflow1x(align_corners=False)``, which
    selects pixels by index; here products with 0-1 matrices select them.
    """
    low, step, fraction = _interpolation(images.shape[-1], size, images)
    images = images @ low.T + (images @ step.T) * fraction
    low, step, fraction = _interpolation(images.shape[-2], size, images)
    return low @ images + (step @ images) * fraction[:, None]


def _interpolation(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices and weights of a one-dimensional linear interpolation.

    Returns:
        (target, source) matrix that selects the lower pixel; (target, source) matrix that gives
        the difference of the upper and the lower pixel; (target,) weights of that difference.
    """
    # On XLA they are computed on the CPU and become constants of the compiled graph. Elsewhere a
    # copy from the CPU would make the host wait for all work of the device.
    device = torch.device("cpu") if requires_static_graph(like.device) else like.device
    scale = float(np.float32(source / target))
    position = torch.arange(target, dtype=torch.float32, device=device) * scale
    lower = position.long()
    upper = (lower + 1).clamp_max(source - 1)
    select = torch.eye(source, dtype=torch.float32, device=device)
    parts = select[lower], select[upper] - select[lower], position - lower.float()
    low, step, fraction = (part.to(like.device) for part in parts)
    return low, step, fraction


def load_inception(path: str | None, without: str = "--metrics psnr ssim lpips") -> Inception:
    """Load the Inception network in eval mode, frozen.

    Args:
        path: weight file as torch-fidelity publishes it; None for torch-fidelity's own copy, which
            is downloaded unless it is cached.
        without: the option that omits FID, for the error message.

    Raises:
        UserError: if the file is missing or contains another network, or the download failed.
    """
    import torch_fidelity.feature_extractor_inceptionv3 as published

    url = published.URL_INCEPTION_V3
    if path is not None:
        path = str(Path(path).expanduser())
        # torch-fidelity unpickles any file; this check ensures that the file holds only tensors
        read_torch_file(path, "weights.inception")
    try:
        extractor = published.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=path
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if path is not None:
            raise UserError(
                f"weights.inception: {path} does not contain the weights of {url} ({reason}): "
                "download that file"
            ) from error
        raise UserError(
            f"FID needs the Inception weights {Path(url).name}, and their download failed "
            f"({reason}). Download {url} and give the file as weights.inception=FILE, or omit the "
            f"metric: {without}"
        ) from error
    source = f"{path}" if path is not None else url
    return Inception(extractor, source).eval().requires_grad_(False)
