"""LPIPS: perceptual distance of two images by features of a frozen VGG16 (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.weights import is_meta, load_strict, read_weight_file

# Output channels of the convolutions in each slice of VGG16 (Simonyan & Zisserman 2015,
# configuration D).
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Index of the first layer of each slice in torchvision's `features`.
SLICE_STARTS = (0, 4, 9, 16, 23)
# Mean and standard deviation of ImageNet for images in [-1, 1], rounded as in the lpips package.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPS = 1e-10  # as in the lpips package

_VGG, _LINEAR = "weights.vgg16", "weights.lpips"
_WITHOUT = "or train without this loss: gan.loss.perceptual_weight=0"


class ScalingLayer(nn.Module):
    """Normalisation of images in [-1, 1] by the statistics of VGG16's training data."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, -1, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise (B, 3, H, W), returned in float32."""
        return (images.float() - self.shift) / self.scale


class VGG16Features(nn.Module):
    """VGG16 up to relu5_3, split into the slices whose outputs LPIPS compares."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for index, widths in enumerate(SLICES):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.add_module(f"slice{index + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of images (B, 3, H, W).

        Each has half the height and width of the one before.
        """
        maps = []
        for layers in self.children():
            x = layers(x)
            maps.append(x)
        return maps


class ChannelWeights(nn.Module):
    """Learned weights of the channels' squared differences."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published key is model.1.weight, after the dropout that LPIPS was trained with.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, squares: Tensor) -> Tensor:
        """Return the mean over positions of the weighted channel sum of (B, C, H, W): (B,)."""
        (weight,) = self.parameters()  # (1, C, 1, 1)
        # No convolution, which would be computed in bfloat16 under autocast and on TPU.
        return (squares * weight.float()).sum(1).mean((1, 2))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018, section 3), frozen.

    Images are (B, 3, H, W) in [-1, 1] with sides of at least 16 pixels. The weights are random;
    ``load_lpips`` builds the network with published ones. Gradients propagate to the images but
    not to the weights. Under autocast the convolutions may run in bfloat16; everything else is
    computed in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for index, widths in enumerate(SLICES):
            self.add_module(f"lin{index}", ChannelWeights(widths[-1]))
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return five float32 feature maps (B, C, h, w), of unit length over the channels."""
        return [_normalise_channels(maps) for maps in self.net(self.scaling_layer(images))]

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Return the distance (B,) between two results of ``features``."""
        layers = [
            self.get_submodule(f"lin{index}")((x - y).square())
            for index, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        return torch.stack(layers).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) between two batches of images."""
        return self.distance(self.features(a), self.features(b))


def _normalise_channels(maps: Tensor) -> Tensor:
    """Return ``maps / (length + 1e-10)`` over the channels, with gradient 0 where the length is 0.

    The derivative of the square root is infinite there, and infinity times zero is NaN: one image
    patch without any activation, such as a black region, would make the whole gradient NaN.
    """
    maps = maps.float()
    squares = maps.square().sum(dim=1, keepdim=True)
    nonzero = squares > 0
    length = torch.where(nonzero, squares, 1.0).sqrt() + NORM_EPS
    # 0 / inf equals 0 / 1e-10, and its derivatives are 0.
    return maps / torch.where(nonzero, length, torch.inf)


def load_lpips(vgg_path: str | None, linear_path: str | None) -> LPIPS:
    """Build LPIPS with published weights; on the meta device no file is read.

    Args:
        vgg_path: local file with the state dict of torchvision's VGG16 or of LPIPS. If None,
            torchvision downloads its ImageNet weights to its cache.
        linear_path: local file with the linear layers of the ``lpips`` package. If None, they are
            read from ``vgg_path`` if it contains them, otherwise from the installed package.

    Raises:
        UserError: if a file is missing, cannot be downloaded or does not match.
    """
    model = LPIPS()
    if is_meta(model):
        return model
    if vgg_path is not None:
        state, where = _read(vgg_path, _VGG), f"{_VGG}: {vgg_path}"
    else:
        state, where = _vgg_from_torchvision()
    load_strict(model.net, _vgg_state(state), f"{where} (keys such as features.0.weight)")
    if linear_path is not None or "lin0.model.1.weight" not in state:
        path = linear_path or _package_file()
        state, where = _read(path, _LINEAR), f"{_LINEAR}: {path}"
    for index in range(len(SLICES)):
        start = f"lin{index}."
        own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        load_strict(model.get_submodule(f"lin{index}"), own, f"{where} (keys under {start})")
    return model


def _vgg_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of ``VGG16Features`` from one of torchvision, LPIPS or ``lpips``."""
    result = {}
    for number, index, parameter in _convolutions():
        key = f"slice{number}.{index - SLICE_STARTS[number - 1]}.{parameter}"
        for name in (
            f"features.{index}.{parameter}",  # torchvision
            f"net.{key}",  # LPIPS
            f"net.slice{number}.{index}.{parameter}",  # the lpips package
        ):
            if name in state:
                result[key] = state[name]
    return result


def _convolutions() -> Iterator[tuple[int, int, str]]:
    """Yield the slice (from 1), index in torchvision's ``features`` and name of each parameter."""
    for number, (start, widths) in enumerate(zip(SLICE_STARTS, SLICES, strict=True), 1):
        for convolution in range(len(widths)):
            for parameter in ("weight", "bias"):
                # All slices but the first start with a max pool; a ReLU follows each convolution.
                yield number, start + (number > 1) + 2 * convolution, parameter


def _read(path: str | Path, setting: str) -> Mapping[str, Tensor]:
    if not Path(path).expanduser().is_file():
        source = _vgg_url() if setting == _VGG else f"the lpips package ({_PACKAGE_FILE})"
        raise UserError(
            f"{setting}: {path} does not exist; get the file from {source} and set "
            f"{setting}=FILE, {_WITHOUT}"
        )
    state: Any = read_weight_file(path, setting)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{setting}: {path} is not a state dict")
    return state


def _vgg_url() -> str:
    try:
        from torchvision.models import VGG16_Weights
    except (ImportError, RuntimeError):
        return "torchvision (VGG16_Weights.IMAGENET1K_V1)"
    return VGG16_Weights.IMAGENET1K_V1.url


def _vgg_from_torchvision() -> tuple[Mapping[str, Tensor], str]:
    # Imported here because torchvision is slow to import and only needed in this case.
    try:
        from torchvision.models import VGG16_Weights

        weights = VGG16_Weights.IMAGENET1K_V1
        return weights.get_state_dict(check_hash=True), f"torchvision's {weights}"
    except Exception as error:  # no network, a wrong hash, or a corrupt file in the cache
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot download the VGG16 weights of LPIPS from {_vgg_url()} ({reason}); download "
            f"the file elsewhere and set {_VGG}=FILE, {_WITHOUT}"
        ) from error


_PACKAGE_FILE = "lpips/weights/v0.1/vgg.pth"


def _package_file() -> Path:
    # Located without importing the package, which would import scipy and torchvision's models.
    spec = importlib.util.find_spec("lpips")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder).parent / _PACKAGE_FILE for folder in folders or ()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"the linear layers of LPIPS ({_PACKAGE_FILE}) are not installed; "
            f"`pip install lpips`, or set {_LINEAR}=FILE, {_WITHOUT}"
        )
    return file
