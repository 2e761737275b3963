"""Flash attention kernels in jax, lowered to XLA computations for torch_xla's graphs.

Requires jax 0.7.1, the version that torch_xla 2.9 is built against; ``flash_attention`` checks it.
Private jax APIs are used for two things that have no public one: ``_splash_attention_bwd``, because
torch and not jax differentiates the forward pass, and ``mlir.LoweringParameters(for_export=True)``,
which selects a format of the program that libtpu 0.0.21 can read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch_xla.core.xla_builder as xb
from jax import Array
from jax._src.interpreters import mlir
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from torch import Tensor

# jax only creates constants. The TPU devices must stay free for torch_xla.
jax.config.update("jax_platforms", "cpu")

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


_JAX_TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


def computation(
    function: Callable[..., tuple[Array, ...]],
    tensors: Sequence[Tensor],
    causal: bool,
    interpret: bool,
) -> Any:
    """Lower one of the functions above to an XLA computation.

    Args:
        function: ``result``, ``forward`` or ``backward``.
        tensors: its arguments, of which shapes and dtypes count.
        causal: whether a query attends to no later key.
        interpret: lower for a CPU instead of a TPU.
    """
    shapes = tuple((tuple(t.shape), _JAX_TYPES[t.dtype]) for t in tensors)
    return _computation(function, shapes, causal, interpret)


@functools.cache
def _computation(
    function: Callable[..., tuple[Array, ...]],
    shapes: tuple[Any, ...],
    causal: bool,
    interpret: bool,
) -> Any:
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    called = functools.partial(function, causal=causal, interpret=interpret)
    lowered = (
        jax.jit(called, keep_unused=True)
        .trace(*given)
        # Without for_export the format is newer than libtpu 0.0.21 can read.
        .lower(
            lowering_platforms=("cpu" if interpret else "tpu",),
            _private_parameters=mlir.LoweringParameters(for_export=True),
        )
    )
    proto = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xb.computation_from_module_proto(function.__name__, proto)
