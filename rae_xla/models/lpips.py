"""LPIPS: how different two images look, by the features of a frozen VGG16 (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.weights import is_meta, load_strict, read_weight_file

# Channels of the convolutions of each part of VGG16 (Simonyan & Zisserman 2015, configuration D).
SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Where each part starts in torchvision's `features`.
SLICE_STARTS = (0, 4, 9, 16, 23)
# Mean and std of ImageNet, taken to [-1, 1] and rounded as LPIPS has them.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NORM_EPS = 1e-10

_VGG, _LINEAR = "weights.vgg16", "weights.lpips"
_WITHOUT = "or train without this loss: gan.loss.perceptual_weight=0"


class ScalingLayer(nn.Module):
    """Images in [-1, 1] to the statistics VGG16 was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, -1, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the same, float32."""
        return (images.float() - self.shift) / self.scale


class VGG16Features(nn.Module):
    """VGG16 up to relu5_3, cut where LPIPS looks."""

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
        """(B, 3, H, W) -> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, each half the size."""
        maps = []
        for part in self.children():
            x = part(x)
            maps.append(x)
        return maps


class ChannelWeights(nn.Module):
    """Learned weight of each channel's squared difference."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The published key is model.1.weight: index 0 is the dropout LPIPS was trained with.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, squares: Tensor) -> Tensor:
        """(B, C, H, W) -> weighted sum over channels, mean over positions: (B,) float32."""
        (weight,) = self.parameters()  # (1, C, 1, 1)
        # Not as a convolution, which autocast and a TPU compute in bfloat16.
        return (squares * weight.float()).sum(1).mean((1, 2))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018, section 3), frozen.

    Images are (B, 3, H, W) in [-1, 1], at least 16 pixels a side. Random weights until
    ``load_lpips`` fills them. Gradients reach the images, never the weights. Under autocast the
    convolutions may run in bfloat16; everything else is float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for index, widths in enumerate(SLICES):
            self.add_module(f"lin{index}", ChannelWeights(widths[-1]))
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Five float32 feature maps (B, C, h, w), of unit length over the channels."""
        return [_unit(maps) for maps in self.net(self.scaling_layer(images))]

    def distance(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distance (B,) between two results of ``features``."""
        layers = [
            self.get_submodule(f"lin{index}")((x - y).square())
            for index, (x, y) in enumerate(zip(a, b, strict=True))
        ]
        return torch.stack(layers).sum(0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance (B,) between two batches of images; 0 for equal ones."""
        return self.distance(self.features(a), self.features(b))


def _unit(maps: Tensor) -> Tensor:
    """``maps / (length + 1e-10)`` over the channels, with gradient 0 where the length is 0.

    The root's own derivative is infinite there, and infinity times zero is NaN: one image patch
    that no channel answers to (a black region, say) would poison the whole gradient.
    """
    maps = maps.float()
    squares = maps.square().sum(dim=1, keepdim=True)
    present = squares > 0
    length = torch.where(present, squares, 1.0).sqrt() + NORM_EPS
    # 0 / inf is 0 as 0 / 1e-10 is, and so are both its derivatives.
    return maps / torch.where(present, length, torch.inf)


def load_lpips(vgg_path: str | None, linear_path: str | None) -> LPIPS:
    """Build LPIPS with its published weights (on the meta device without them: nothing is read).

    Args:
        vgg_path: local file with VGG16 as torchvision has it, or with a whole LPIPS; when None,
            torchvision downloads ImageNet weights once and keeps them.
        linear_path: local file with the linear layers as the ``lpips`` package has them; when
            None they come from ``vgg_path`` if that is a whole LPIPS, else from the package.

    Raises:
        UserError: if a file is missing, cannot be had or does not fit.
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
    """Weights by our names, from a file by torchvision's, LPIPS's or the lpips package's."""
    found = {}
    for part, position, parameter in _convolutions():
        start = SLICE_STARTS[part - 1]
        own = f"slice{part}.{position - start}.{parameter}"
        for name in (
            f"features.{position}.{parameter}",
            f"net.{own}",
            f"net.slice{part}.{position}.{parameter}",
        ):
            if name in state:
                found[own] = state[name]
    return found


def _convolutions() -> Iterator[tuple[int, int, str]]:
    """Part (from 1), index in torchvision's ``features`` and name of each parameter of VGG16."""
    for part, (start, widths) in enumerate(zip(SLICE_STARTS, SLICES, strict=True), 1):
        for index in range(len(widths)):
            for parameter in ("weight", "bias"):
                yield part, start + (part > 1) + 2 * index, parameter


def _read(path: str | Path, setting: str) -> Mapping[str, Tensor]:
    if not Path(path).expanduser().is_file():
        source = _vgg_url() if setting == _VGG else f"the lpips package ({_PACKAGE_FILE})"
        raise UserError(
            f"{setting}: there is no file {path}; get it from {source} and give it as "
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
    # Imported here: torchvision is slow to import and only this needs it.
    try:
        from torchvision.models import VGG16_Weights

        weights = VGG16_Weights.IMAGENET1K_V1
        return weights.get_state_dict(check_hash=True), f"torchvision's {weights}"
    except Exception as error:  # no network, another hash, or a broken file in the cache
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"VGG16 of LPIPS could not be had from {_vgg_url()} ({reason}); download that file "
            f"and give it as {_VGG}=FILE, {_WITHOUT}"
        ) from error


_PACKAGE_FILE = "lpips/weights/v0.1/vgg.pth"


def _package_file() -> Path:
    # Found without importing the package, which brings scipy and torchvision's models along.
    spec = importlib.util.find_spec("lpips")
    places = spec.submodule_search_locations if spec is not None else None
    files = [Path(place).parent / _PACKAGE_FILE for place in places or ()]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"the linear layers of LPIPS ({_PACKAGE_FILE}) are not installed; "
            f"`pip install lpips`, or give the file as {_LINEAR}=FILE, {_WITHOUT}"
        )
    return found
