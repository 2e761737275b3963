"""Layers of the diffusion transformers (DiT, Peebles & Xie 2023; LightningDiT, Yao et al. 2025).

Shapes: B images, L tokens, D channels. A conditioning tensor ``c`` is always (B, Lc, D), where Lc
divides L and each row of ``c`` applies to L / Lc consecutive tokens: Lc = 1 is one vector per
image, Lc = L one vector per token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.errors import UserError
from rae_xla.ops.attention import attention
from rae_xla.ops.normalization import LayerNorm, RMSNorm
from rae_xla.ops.rotary import RopeTables, rotary_attention


class FusedLinear(nn.Linear):
    """Linear layers with a common input and equal widths, stored as one of ``parts * width`` rows.

    Args:
        dim: input channels.
        width: output channels of each layer.
        parts: number of layers.
        separate: whether they are layers in their own right, which an optimizer of matrices treats
            one by one; otherwise one layer whose output is split.
    """

    def __init__(self, dim: int, width: int, parts: int, separate: bool = True) -> None:
        super().__init__(dim, parts * width)
        self.parts = parts
        self.separate = separate

    def forward(  # type: ignore[override]
        self, x: Tensor, heads: int | None = None
    ) -> tuple[Tensor, ...]:
        """Apply every layer to ``x``.

        Args:
            x: (..., dim); (B, L, dim) if ``heads`` is given.
            heads: number of attention heads to split the outputs into.

        Returns:
            One output per layer: (..., width), or (B, heads, L, width / heads) with ``heads``.
        """
        parts = super().forward(x).chunk(self.parts, dim=-1)
        if heads is None:
            return parts
        return tuple(part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)


class SwiGLU(nn.Module):
    """Gated feed-forward layer with both input projections fused in ``w12`` (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = FusedLinear(dim, hidden, 2)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., dim)."""
        gate, value = self.w12(x)
        return self.w3(F.silu(gate) * value)


class Mlp(nn.Module):
    """Feed-forward layer with tanh-approximated GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def channels_per_head(dim: int, num_heads: int) -> int:
    """Return the number of channels of one attention head.

    Raises:
        UserError: if ``num_heads`` does not divide ``dim``.
    """
    if dim % num_heads:
        raise UserError(
            f"hidden_size {dim} is not divisible by num_heads {num_heads}; "
            "choose a number of heads that divides it"
        )
    return dim // num_heads


class Attention(nn.Module):
    """Multi-head self-attention with optional query/key norm and rotary positions.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        use_qknorm: normalise queries and keys per head.
        use_rmsnorm: use RMSNorm for that; otherwise LayerNorm.
    """

    def __init__(self, dim: int, num_heads: int, *, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = channels_per_head(dim, num_heads)
        norm = RMSNorm if use_rmsnorm else LayerNorm
        self.qkv = FusedLinear(dim, dim, 3)
        self.q_norm = norm(self.head_dim) if use_qknorm else nn.Identity()
        self.k_norm = norm(self.head_dim) if use_qknorm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, rope: RopeTables | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens of (B, L, dim); ``rope`` are tables for L tokens.

        ``bias`` is that of ``ops.attention``.
        """
        batch, length, dim = x.shape
        q, k, v = self.qkv(x, heads=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            out = rotary_attention(q, k, v, rope, bias)
        else:
            # Under autocast a float32 norm weight promotes q and k; attention requires one dtype.
            out = attention(q.to(v.dtype), k.to(v.dtype), v, bias=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """Return ``x * (1 + scale) + shift``, the affine map of an adaptive norm; None: no shift."""
    x = x * (1 + scale)
    return x if shift is None else x + shift


def per_token(c: Tensor, length: int) -> Tensor:
    """Repeat the rows of ``c`` (B, Lc, D) to (B, length, D); keep a single row for broadcasting.

    Raises:
        UserError: if Lc does not divide ``length``.
    """
    rows = c.shape[1]
    if rows in (1, length):
        return c
    if length % rows:
        raise UserError(
            f"conditioning with {rows} tokens does not fit {length} tokens; "
            f"give a number of conditioning tokens that divides {length}"
        )
    return c.repeat_interleave(length // rows, dim=1)


def block_norm(dim: int, use_rmsnorm: bool) -> nn.Module:
    """Build the norm that precedes a modulation: RMSNorm, or LayerNorm without an affine map."""
    return RMSNorm(dim) if use_rmsnorm else LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def feed_forward(dim: int, mlp_ratio: float, *, use_swiglu: bool) -> nn.Module:
    """Build the feed-forward layer of a block; ``mlp_ratio`` is its hidden width over ``dim``."""
    hidden = int(dim * mlp_ratio)
    # 2/3 keeps the number of parameters: a gated layer has three matrices instead of two
    # (Shazeer 2020).
    return SwiGLU(dim, int(2 / 3 * hidden)) if use_swiglu else Mlp(dim, hidden)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block without conditioning: its conditions are tokens (RAEv2).

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward layer over ``dim``.
        use_qknorm: normalise queries and keys per head.
        use_swiglu: use a SwiGLU feed-forward layer; otherwise tanh-GELU.
        use_rmsnorm: use RMSNorm; otherwise LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rmsnorm: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim) if use_rmsnorm else LayerNorm(dim, eps=1e-6)
        self.norm2 = RMSNorm(dim) if use_rmsnorm else LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, use_qknorm=use_qknorm, use_rmsnorm=use_rmsnorm)
        self.mlp = feed_forward(dim, mlp_ratio, use_swiglu=use_swiglu)

    def forward(self, x: Tensor, rope: RopeTables | None, bias: Tensor | None = None) -> Tensor:
        """Transform tokens (B, L, dim).

        Args:
            x: tokens.
            rope: rotary tables for L tokens, or None for no rotary positions.
            bias: of the attention scores, see ``ops.attention``.
        """
        x = x + self.attn(self.norm1(x), rope, bias)
        return x + self.mlp(self.norm2(x))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, section 3.2).

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the feed-forward layer over ``dim``.
        use_qknorm: normalise queries and keys per head.
        use_swiglu: use a SwiGLU feed-forward layer; otherwise tanh-GELU.
        use_rmsnorm: use RMSNorm; otherwise LayerNorm.
        wo_shift: omit both shifts of the modulation, and their parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        use_qknorm: bool = False,
        use_swiglu: bool = True,
        use_rmsnorm: bool = True,
        wo_shift: bool = False,
    ) -> None:
        super().__init__()
        self.wo_shift = wo_shift
        self.norm1 = block_norm(dim, use_rmsnorm)
        self.norm2 = block_norm(dim, use_rmsnorm)
        self.attn = Attention(dim, num_heads, use_qknorm=use_qknorm, use_rmsnorm=use_rmsnorm)
        self.mlp = feed_forward(dim, mlp_ratio, use_swiglu=use_swiglu)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), FusedLinear(dim, dim, 4 if wo_shift else 6, separate=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the modulation to zero, so that the block is initially the identity."""
        zero(self.adaLN_modulation)

    def forward(self, x: Tensor, c: Tensor, rope: RopeTables | None) -> Tensor:
        """Transform tokens ``x`` (B, L, dim), conditioned on ``c`` (B, Lc, dim).

        Args:
            x: tokens.
            c: conditioning; Lc divides L.
            rope: rotary tables for L tokens, or None for no rotary positions.

        Returns:
            (B, L, dim).
        """
        modulation = [per_token(part, x.shape[1]) for part in self.adaLN_modulation(c)]
        shift1: Tensor | None = None
        shift2: Tensor | None = None
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = modulation
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm, then a projection of each token to the values of its patch.

    Args:
        dim: channels of the tokens.
        out_features: values of a patch.
        use_rmsnorm: use RMSNorm; otherwise LayerNorm.
        modulated: whether the norm is modulated by a condition.
    """

    def __init__(
        self, dim: int, out_features: int, *, use_rmsnorm: bool, modulated: bool = True
    ) -> None:
        super().__init__()
        self.norm_final = block_norm(dim, use_rmsnorm)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation: nn.Sequential | None = None
        if modulated:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), FusedLinear(dim, dim, 2, separate=False)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both linear layers to zero, so that the model initially predicts zero."""
        zero(self.linear)
        if self.adaLN_modulation is not None:
            zero(self.adaLN_modulation)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Project ``x`` (B, L, dim) to (B, L, out_features).

        Args:
            x: tokens.
            c: conditioning (B, Lc, dim) of a modulated norm.
        """
        if self.adaLN_modulation is None:
            return self.linear(self.norm_final(x))
        shift, scale = (per_token(part, x.shape[1]) for part in self.adaLN_modulation(c))
        return self.linear(modulate(self.norm_final(x), shift, scale))


def zero(module: nn.Module) -> None:
    """Set every parameter of a module to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def xavier_linear(linear: nn.Linear) -> None:
    """Initialise a linear layer with a Xavier-uniform weight and a zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_weights(
    model: nn.Module, linear: Callable[[nn.Linear], None] = nn.Linear.reset_parameters
) -> None:
    """Initialise every parameter and table of ``model``, as after ``to_empty``.

    Modules are reset by their ``reset_parameters``, children before parents, so that a parent can
    override the initialisation of its children.

    Args:
        model: a model whose tensors have storage but no values.
        linear: initialises each ``nn.Linear``.
    """
    for module in reversed(list(model.modules())):
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, nn.Linear):
            linear(module)
        elif callable(reset):
            reset()
