"""Discriminator of stage 1: small convolutional heads on the tokens of a frozen DINO ViT.

Projected GAN (Sauer et al. 2021) in the transformer form of StyleGAN-T (Sauer et al. 2023). Shapes:
B images, C channels (the backbone's width), L patch tokens in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.models.dino_vit import DINOViT

GROUPS = 32  # of the group norm, as published
SPECTRAL_EPS = 1e-12  # as in torch.nn.utils.spectral_norm


class CircularConv1d(nn.Conv1d):
    """Convolution with an odd kernel and circular padding, which preserves the length."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.pad = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, L) to (B, out_channels, L)."""
        return F.conv1d(self._pad_circular(x), self.weight, self.bias)

    def _pad_circular(self, x: Tensor) -> Tensor:
        # Concatenated slices, because not every backend implements circular padding.
        if not self.pad:
            return x
        return torch.cat([x[..., -self.pad :], x, x[..., : self.pad]], dim=-1)


class SpectralConv1d(CircularConv1d):
    """Circular convolution whose weight is divided by its spectral norm (Miyato et al. 2018).

    ``weight_orig`` is the trained parameter; there is no ``weight``. ``weight_u`` and ``weight_v``
    estimate the singular vectors. Each forward pass in train mode updates them by one power
    iteration; in eval mode they are constant.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        weight = self.weight.data
        # Registered after the bias, for the order of the published state dict.
        del self.weight
        self.weight_orig = nn.Parameter(weight)
        self.register_buffer("weight_u", weight.new_empty(out_channels))
        self.register_buffer("weight_v", weight.new_empty(in_channels * kernel_size))
        self._reset_vectors()

    def reset_parameters(self) -> None:
        """Initialise the weight as ``nn.Conv1d`` does, and estimate its singular vectors."""
        if "weight_orig" not in self._parameters:  # called by the constructor of nn.Conv1d
            super().reset_parameters()
            return
        nn.init.kaiming_uniform_(self.weight_orig, a=math.sqrt(5))  # as in nn.Conv1d
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight_orig[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_vectors()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, in_channels, L) to (B, out_channels, L)."""
        matrix = self.weight_orig.float().flatten(1)
        u, v = self.weight_u, self.weight_v
        if self.training:
            # New tensors, because the backward pass of an earlier forward still needs the old ones.
            with torch.no_grad():
                u, v = _power_iteration(matrix, u)
                self.weight_u.copy_(u)
                self.weight_v.copy_(v)
        else:
            u, v = u.clone(), v.clone()
        sigma = (u * _matvec(matrix, v)).sum()
        return F.conv1d(self._pad_circular(x), self.weight_orig / sigma, self.bias)

    @torch.no_grad()
    def _reset_vectors(self) -> None:
        # Random vectors would give an almost zero norm in eval mode before any training. 15
        # iterations, as in torch.nn.utils.parametrizations.spectral_norm.
        matrix = self.weight_orig.float().flatten(1)
        u = v = F.normalize(torch.randn_like(self.weight_u), dim=0, eps=SPECTRAL_EPS)
        for _ in range(15):
            u, v = _power_iteration(matrix, u)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)


def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = F.normalize(_matvec(matrix.T, u), dim=0, eps=SPECTRAL_EPS)
    return F.normalize(_matvec(matrix, v), dim=0, eps=SPECTRAL_EPS), v


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    # Elementwise products and sums stay in float32. A matrix product would be computed in bfloat16
    # under autocast, and by default on TPU, even of float32 factors.
    return (matrix * vector).sum(1)


class BatchNormLocal(nn.Module):
    """Normalise each channel of each sample over its length, in float32 even under autocast.

    This is the published discriminator's batch norm with a virtual batch of one: in train and in
    eval mode the mean and the biased variance are those of the sample.

    Args:
        channels: number of channels.
        eps: added to the variance.
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
        """Normalise (B, channels, L), returned in float32."""
        x = x.float()
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        normed = centred * torch.rsqrt(variance + self.eps)
        return normed * self.weight.float()[:, None] + self.bias.float()[:, None]


class GroupNormFloat(nn.GroupNorm):
    """Group norm of 32 groups in float32, even under autocast (Wu & He 2018).

    Raises:
        UserError: if ``channels`` is not divisible by 32.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        if channels % GROUPS:
            raise UserError(
                f"gan.disc.arch.norm_type=gn requires a multiple of {GROUPS} channels, and the "
                f"backbone has {channels}; choose norm_type=bn"
            )
        super().__init__(GROUPS, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, channels, L), returned in float32."""
        return F.group_norm(
            x.float(), GROUPS, self.weight.float(), self.bias.float(), self.eps
        ).float()


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "bn": BatchNormLocal,
    "gn": GroupNormFloat,
}
"""Constructors (channels, eps) of the heads' norms, by their published names."""


class ScaledResidual(nn.Module):
    """Residual connection ``(fn(x) + x) / sqrt(2)``, which preserves the variance."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        return (self.fn(x) + x) * (1 / math.sqrt(2))


class DinoDiscriminator(nn.Module):
    """Discriminator with one head per selected block of a frozen DINO ViT.

    Each head computes one logit per token. The state dict contains only the heads, under the
    published keys. The backbone is not a submodule, so moving, sharding, training or saving the
    discriminator does not affect it: the caller moves it to the same device.

    Args:
        backbone: frozen network whose tokens are classified.
        ks: odd kernel size of the second convolution of a head.
        key_depths: blocks whose tokens are used besides the last's; see
            ``DINOViT.intermediate_tokens``.
        norm_type: ``bn`` (per-sample batch norm) or ``gn`` (group norm).
        using_spec_norm: whether the convolutions are spectrally normalised.
        norm_eps: added to the variance in the norms.

    Raises:
        UserError: if ``norm_type`` or ``ks`` is invalid.
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
                f"gan.disc.arch.norm_type: unknown norm {norm_type!r}; "
                f"choose one of {', '.join(NORMS)}"
            )
        if ks < 1 or ks % 2 == 0 or ks // 2 > backbone.config.num_tokens:
            raise UserError(
                f"gan.disc.arch.ks must be an odd kernel size of at most "
                f"{2 * backbone.config.num_tokens + 1} tokens, got {ks}"
            )
        # A tuple hides the backbone from nn.Module, which would register it as a child.
        self._backbone = (backbone,)
        self.key_depths = backbone.key_depths(key_depths)
        conv = SpectralConv1d if using_spec_norm else CircularConv1d
        norm = NORMS[norm_type]
        channels = backbone.config.embed_dim

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
        """The frozen backbone, which is not a submodule."""
        return self._backbone[0]

    def features(self, images: Tensor) -> list[Tensor]:
        """Return one tensor of tokens (B, L, C) per head, of images (B, 3, H, W) in [-1, 1]."""
        return self.backbone.intermediate_tokens(images, self.key_depths)

    def heads_forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute float32 logits (B, number of heads * L) from the result of ``features``.

        In train mode this updates the singular vectors by one power iteration.
        """
        logits = [
            head(tokens.transpose(1, 2)).flatten(1).float()
            for head, tokens in zip(self.heads, features, strict=True)
        ]
        return torch.cat(logits, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute float32 logits (B, number of heads * L) of images (B, 3, H, W) in [-1, 1]."""
        return self.heads_forward(self.features(images))
