"""Features of pictures by the Inception network that published figures rest on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.weights import read_torch_file
from rae_xla.runtime import Batch, Runtime

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

FEATURES = 2048
SPATIAL_CHANNELS = 7
SPATIAL_FEATURES = SPATIAL_CHANNELS * 17 * 17
CLASSES = 1008
SIDE = 299
LAST_SPATIAL = "Mixed_6d"
"""TensorFlow's ``mixed_6``, by the table torch-fidelity converted the weights with."""
WITHOUT = "--metrics psnr ssim lpips"


class FeatureModule(nn.Module):
    """Makes named features (B, D), float32, of pictures (B, 3, H, W) uint8."""

    source: str
    """Where the weights come from, for reports."""


class Inception(FeatureModule):
    """``inception-v3-compat`` of torch-fidelity: the TensorFlow network of 2015, ported.

    The layers are torch-fidelity's own. Only the resize before them is ours: matrix products in the
    place of indexing, with the same result to the last bit.
    """

    def __init__(self, extractor: FeatureExtractorInceptionV3, source: str) -> None:
        super().__init__()
        # torch-fidelity declares its layers in the order they are applied
        layers = dict(extractor.named_children())
        self.classes = nn.Linear(FEATURES, CLASSES, bias=False)
        self.classes.weight = layers.pop("fc").weight
        names = list(layers)
        after = names.index(LAST_SPATIAL) + 1
        self.spatial = nn.Sequential(*(layers[name] for name in names[:after]))
        self.pool = nn.Sequential(*(layers[name] for name in names[after:]))
        self.source = source

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features, float32, of pictures (B, 3, H, W) uint8.

        Returns:
            ``pool`` (B, 2048), what FID, precision and recall compare; ``spatial`` (B, 2023), what
            sFID does: the first 7 channels of the map TensorFlow calls ``mixed_6/conv``, 17 x 17,
            channels last as in the moments of the ADM suite (Nash et al. 2021); ``logits``
            (B, 1008), what the Inception Score is of: without their bias, as torch-fidelity and the
            ADM suite have it.
        """
        images = resize_like_tensorflow1(pixels.float(), SIDE)
        maps = self.spatial((images - 128) / 128)
        pool = self.pool(maps).flatten(1)
        # the block's output begins with that of its 1 x 1 convolution, mixed_6/conv
        spatial = maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": self.classes(pool)}


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize (..., H, W) to (..., size, size) as TensorFlow 1 did: bilinear, corners not aligned
    and pixel centres not either.

    Equal, bit by bit on the CPU, to torch-fidelity's
    ``interpolate_bilinear_2d_like_tensorflow1x(align_corners=False)``, which picks pixels by index;
    here products with matrices of ones and zeros pick them.
    """
    low, step, fraction = _taps(images.shape[-1], size, images)
    images = images @ low.T + (images @ step.T) * fraction
    low, step, fraction = _taps(images.shape[-2], size, images)
    return low @ images + (step @ images) * fraction[:, None]


def _taps(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(target, source) matrices that pick the lower pixel, and the difference to the upper one, and
    how far between them each target pixel lies.
    """
    scale = torch.tensor(source / target, dtype=torch.float32, device="cpu")
    position = torch.arange(target, dtype=torch.float32, device="cpu") * scale
    lower = position.long()
    upper = (lower + 1).clamp_max(source - 1)
    pick = torch.eye(source, dtype=torch.float32, device="cpu")
    taps = pick[lower], pick[upper] - pick[lower], position - lower.float()
    low, step, fraction = (tap.to(like.device) for tap in taps)
    return low, step, fraction


def load_inception(path: str | None, without: str = WITHOUT) -> Inception:
    """The network with its weights, in eval mode and frozen.

    Args:
        path: file of the weights as torch-fidelity publishes them; None: torch-fidelity's own copy,
            downloaded where it is not in its cache.
        without: the option that leaves FID out, for the error.

    Raises:
        UserError: the file is missing or another network's, or the download failed.
    """
    import torch_fidelity.feature_extractor_inceptionv3 as published

    url = published.URL_INCEPTION_V3
    if path is not None:
        path = str(Path(path).expanduser())
        # torch-fidelity unpickles whatever it is given; by then it is known to be tensors alone
        read_torch_file(path, "weights.inception")
    try:
        extractor = published.FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(FEATURES)], feature_extractor_weights_path=path
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if path is not None:
            raise UserError(
                f"weights.inception: {path} does not hold the weights of {url} ({reason})"
            ) from error
        raise UserError(
            f"FID needs the Inception weights {Path(url).name}, which could not be downloaded "
            f"({reason}). Fetch {url} and give the file as weights.inception=FILE, or leave the "
            f"metric out: {without}"
        ) from error
    source = f"{path}" if path is not None else url
    return Inception(extractor, source).eval().requires_grad_(False)


class FeatureNetwork:
    """A ``FeatureModule`` on the devices, compiled: pictures to features, both on the devices."""

    def __init__(self, network: FeatureModule, runtime: Runtime) -> None:
        runtime.place(network)
        self.source = network.source

        @runtime.compile
        def features(pixels: Tensor) -> Batch:
            with torch.no_grad():
                made: Batch = network(pixels)
            return made

        self._features = features

    def all(self, pixels: Tensor) -> Batch:
        """Every feature (B, D) of a whole chunk of pictures (B, 3, H, W) uint8, by name."""
        return self._features(pixels)

    def __call__(self, pixels: Tensor) -> Tensor:
        """What an ``Inception`` calls ``pool``, (B, 2048), of a whole chunk of pictures."""
        return self._features(pixels)["pool"]
