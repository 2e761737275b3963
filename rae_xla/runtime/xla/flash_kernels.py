"""Flash attention kernels in jax.

Requires jax 0.7.1, see ``jax_programs``. The private ``_splash_attention_bwd`` has no public
replacement: torch and not jax differentiates the forward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

LANES = 128
"""Width of a TPU vector register: tokens and channels are processed in multiples of it."""

# Block sizes in tokens: maxtext's, with as many keys as fit into memory next to the queries.
_QUERY_BLOCK, _KEY_BLOCK, _KEY_COMPUTE_BLOCK = 512, 1024, 512


def result(
    query: Array, key: Array, value: Array, causal: bool, interpret: bool
) -> tuple[Array, ...]:
    """Compute attention of (B, heads, N, d) arrays; return a tuple of the result alone."""
    attend = _kernel(query, causal, residuals=False, interpret=interpret)
    attended = jax.vmap(attend)(*_padded(_scaled(query), key, value))
    return (attended[..., : value.shape[-1]],)


def forward(
    query: Array, key: Array, value: Array, causal: bool, interpret: bool
) -> tuple[Array, ...]:
    """Compute attention of (B, heads, N, d) arrays.

    Returns:
        The result, and the logarithms of the softmax's sums, (B, heads, N) float32.
    """
    attend = _kernel(query, causal, residuals=True, interpret=interpret)
    attended, (log_sums,) = jax.vmap(attend)(*_padded(_scaled(query), key, value))
    return attended[..., : value.shape[-1]], log_sums


def backward(
    query: Array,
    key: Array,
    value: Array,
    attended: Array,
    log_sums: Array,
    gradient: Array,
    causal: bool,
    interpret: bool,
) -> tuple[Array, ...]:
    """Return the gradients of query, key and value from the inputs and results of ``forward``."""
    attend = _kernel(query, causal, residuals=False, interpret=interpret)

    def one_image(q: Array, k: Array, v: Array, o: Array, sums: Array, do: Array) -> Any:
        kept = (q, k, v, None, None, o, sums, attend.dq_mask_info, attend.dkv_mask_info)
        return splash._splash_attention_bwd(**attend.kwargs, res=kept, do=do)[3:6]

    q, k, v, o, do = _padded(_scaled(query), key, value, attended, gradient)
    found = jax.vmap(one_image)(q, k, v, o, log_sums, do)
    q_gradient, k_gradient, v_gradient = (array[..., : query.shape[-1]] for array in found)
    return q_gradient * query.shape[-1] ** -0.5, k_gradient, v_gradient


def _scaled(query: Array) -> Array:
    return query * query.shape[-1] ** -0.5


def _padded(*arrays: Array) -> list[Array]:
    """Pad the channels with zeros to a multiple of ``LANES``; zeros change no product."""
    missing = -arrays[0].shape[-1] % LANES
    return [jnp.pad(array, [(0, 0)] * 3 + [(0, missing)]) for array in arrays]


def _kernel(query: Array, causal: bool, *, residuals: bool, interpret: bool) -> Any:
    heads, tokens = query.shape[1:3]
    queries, keys = _divisor(tokens, _QUERY_BLOCK), _divisor(tokens, _KEY_BLOCK)
    computed = _divisor(keys, _KEY_COMPUTE_BLOCK)
    sizes = splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=computed,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask_of_head = masks.CausalMask if causal else masks.FullMask
    mask = masks.MultiHeadMask([mask_of_head((tokens, tokens))] * heads)
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=residuals,
        interpret=interpret,
    )  # fmt: skip


def _divisor(tokens: int, most: int) -> int:
    """The largest divisor of ``tokens`` up to ``most`` that is a multiple of ``LANES``."""
    return max(n for n in range(LANES, min(tokens, most) + 1, LANES) if tokens % n == 0)
