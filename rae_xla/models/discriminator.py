"""The discriminator of stage 1: small convolutional heads on the tokens of a frozen DINO ViT.

Projected GAN (Sauer et al. 2021), its transformer form from StyleGAN-T (Sauer et al. 2023). Shapes:
B images, C channels (the backbone's width), L patch tokens, taken as a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.models.dino_vit import DINOViT

GROUPS = 32
SPECTRAL_EPS = 1e-12


class CircularConv1d(nn.Conv1d):
    """Convolution of odd kernel that keeps the length: the sequence is taken as a ring."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.reach = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, L) -> (B, out_channels, L)."""
        return F.conv1d(self._as_ring(x), self.weight, self.bias)

    def _as_ring(self, x: Tensor) -> Tensor:
        # Concatenated slices: every backend has them, which not all have a circular pad.
        if not self.reach:
            return x
        return torch.cat([x[..., -self.reach :], x, x[..., : self.reach]], dim=-1)


class SpectralConv1d(CircularConv1d):
    """The same with its weight divided by its largest singular value (Miyato et al. 2018).

    ``weight_orig`` is trained. ``weight_u`` and ``weight_v`` estimate the singular vectors; each
    forward in train mode improves them by one power iteration, in eval mode they stand still.
    There is no ``weight``.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        weight = self.weight.data
        # After the bias, where the published state dict has it.
        del self.weight
        self.weight_orig = nn.Parameter(weight)
        self.register_buffer("weight_u", weight.new_empty(out_channels))
        self.register_buffer("weight_v", weight.new_empty(in_channels * kernel_size))
        self._reset_vectors()

    def reset_parameters(self) -> None:
        """Draw the weight as any convolution does, and the singular vectors from it."""
        if "weight_orig" not in self._parameters:  # called by the parent's constructor
            super().reset_parameters()
            return
        nn.init.kaiming_uniform_(self.weight_orig, a=math.sqrt(5))  # as in torch
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight_orig[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_vectors()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, L) -> (B, out_channels, L)."""
        matrix = self.weight_orig.float().flatten(1)
        u, v = self.weight_u, self.weight_v
        if self.training:
            # Into new tensors: the backward of an earlier forward still needs its own.
            with torch.no_grad():
                u, v = _power_iteration(matrix, u)
                self.weight_u.copy_(u)
                self.weight_v.copy_(v)
        else:
            u, v = u.clone(), v.clone()
        sigma = (u * _times(matrix, v)).sum()
        return F.conv1d(self._as_ring(x), self.weight_orig / sigma, self.bias)

    @torch.no_grad()
    def _reset_vectors(self) -> None:
        # A random start alone would divide by almost nothing in eval mode before any training;
        # 15 iterations as in torch.nn.utils.parametrizations.
        matrix = self.weight_orig.float().flatten(1)
        u = v = F.normalize(torch.randn_like(self.weight_u), dim=0, eps=SPECTRAL_EPS)
        for _ in range(15):
            u, v = _power_iteration(matrix, u)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)


def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = F.normalize(_times(matrix.T, u), dim=0, eps=SPECTRAL_EPS)
    return F.normalize(_times(matrix, v), dim=0, eps=SPECTRAL_EPS), v


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    # Products and sums instead of a matrix product: neither autocast nor a TPU, whose float32
    # matrix products are of bfloat16 factors, lowers their precision.
    return (matrix * vector).sum(1)


class BatchNormLocal(nn.Module):
    """Normalise each channel of each sample over its length, in float32 under autocast too.

    The published discriminator's batch norm with a virtual batch of one: the statistics (biased
    variance) are the sample's own, in train and eval mode alike.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def reset_parameters(self) -> None:
        """Set the affine map to the identity."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) -> the same shape, float32."""
        x = x.float()
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        normed = centred * torch.rsqrt(variance + self.eps)
        return normed * self.weight.float()[:, None] + self.bias.float()[:, None]


class GroupNormFloat(nn.GroupNorm):
    """Group norm of 32 groups in float32, under autocast too (Wu & He 2018)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        if channels % GROUPS:
            raise UserError(
                f"gan.disc.arch.norm_type=gn has {GROUPS} groups, which do not divide the "
                f"backbone's {channels} channels; choose norm_type=bn"
            )
        super().__init__(GROUPS, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, L) -> the same shape, float32."""
        return F.group_norm(
            x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps
        ).float()


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "bn": BatchNormLocal,
    "gn": GroupNormFloat,
}
"""Norms of the heads by their published names."""


class ScaledResidual(nn.Module):
    """``(fn(x) + x) / sqrt(2)``: the variance stays."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of ``x``."""
        return (self.fn(x) + x) * (1 / math.sqrt(2))


class DinoDiscriminator(nn.Module):
    """One head per tap of a frozen DINO ViT, each judging every token.

    The state dict holds the heads alone, under the published keys. The backbone is not a
    submodule: moving, sharding, training or saving the discriminator leaves it where and as it
    is, so place it yourself, on the same device.

    Args:
        backbone: frozen network whose tokens are judged.
        ks: odd kernel size of the second convolution of a head.
        key_depths: blocks tapped besides the last; (2, 5, 8, 11) when None, those beyond the
            backbone's depth dropped.
        norm_type: ``bn`` (per-sample batch norm) or ``gn`` (group norm).
        using_spec_norm: whether the convolutions are spectrally normalised.
        norm_eps: added to the variance in the norms.

    Raises:
        UserError: if ``norm_type`` or ``ks`` is impossible.
    """

    def __init__(
        self,
        backbone: DINOViT,
        ks: int = 9,
        key_depths: Iterable[int] | None = None,
        norm_type: str = "bn",
        using_spec_norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm_type not in NORMS:
            raise UserError(
                f"gan.disc.arch.norm_type: there is no {norm_type!r}; "
                f"choose one of {', '.join(NORMS)}"
            )
        if ks < 1 or ks % 2 == 0 or ks // 2 > backbone.shape.num_tokens:
            raise UserError(
                f"gan.disc.arch.ks must be an odd kernel size of at most "
                f"{2 * backbone.shape.num_tokens + 1} tokens, got {ks}"
            )
        # A tuple hides the backbone from nn.Module, which would register it as a child.
        self._held = (backbone,)
        self.key_depths = backbone.key_depths(key_depths)
        conv = SpectralConv1d if using_spec_norm else CircularConv1d
        norm = NORMS[norm_type]
        channels = backbone.shape.embed_dim

        def stage(kernel: int) -> nn.Sequential:
            return nn.Sequential(
                conv(channels, channels, kernel), norm(channels, norm_eps), nn.LeakyReLU(0.2)
            )

        self.heads = nn.ModuleList(
            nn.Sequential(stage(1), ScaledResidual(stage(ks)), conv(channels, 1, 1))
            for _ in range(len(self.key_depths) + 1)
        )

    @property
    def backbone(self) -> DINOViT:
        """The frozen network. Not a submodule: it is neither moved nor saved with this one."""
        return self._held[0]

    def features(self, images: Tensor) -> list[Tensor]:
        """Tokens that the heads judge, each (B, L, C), of images (B, 3, H, W) in [-1, 1]."""
        return self.backbone.taps(images, self.key_depths)

    def heads_forward(self, features: Sequence[Tensor]) -> Tensor:
        """Judge what ``features`` returned: float32 logits (B, number of heads * L).

        In train mode the singular vectors advance by one power iteration.
        """
        logits = [
            head(tokens.transpose(1, 2)).flatten(1).float()
            for head, tokens in zip(self.heads, features, strict=True)
        ]
        return torch.cat(logits, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Judge images (B, 3, H, W) in [-1, 1] of any size: float32 logits as above."""
        return self.heads_forward(self.features(images))
