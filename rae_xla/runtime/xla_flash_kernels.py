"""The kernels of ``xla_flash``, lowered by jax for torch_xla's graphs. Imported where jax is."""

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

# Nothing but constants is made in jax, and the chips belong to torch_xla.
jax.config.update("jax_platforms", "cpu")

LANES = 128
"""Of a TPU's vector registers: the kernels work on so many tokens and channels at a time."""

# Tokens a kernel works on at a time (maxtext's, but for as many keys as fit beside the queries).
_QUERIES, _KEYS, _KEYS_COMPUTED = 512, 1024, 512


def result(query: Array, key: Array, value: Array, interpret: bool) -> tuple[Array, ...]:
    """(B, heads, N, d) arrays -> (mixed,)."""
    attend = _kernel(*query.shape[1:3], residuals=False, interpret=interpret)
    mixed = jax.vmap(attend)(*_padded(_scaled(query), key, value))
    return (mixed[..., : value.shape[-1]],)


def forward(query: Array, key: Array, value: Array, interpret: bool) -> tuple[Array, ...]:
    """(B, heads, N, d) arrays -> mixed, and (B, heads, N) logarithms of the sums of weights."""
    attend = _kernel(*query.shape[1:3], residuals=True, interpret=interpret)
    mixed, (log_sums,) = jax.vmap(attend)(*_padded(_scaled(query), key, value))
    return mixed[..., : value.shape[-1]], log_sums


def backward(
    query: Array,
    key: Array,
    value: Array,
    mixed: Array,
    log_sums: Array,
    gradient: Array,
    interpret: bool,
) -> tuple[Array, ...]:
    """Gradients of query, key and value from what ``forward`` took and gave."""
    attend = _kernel(*query.shape[1:3], residuals=False, interpret=interpret)

    def of_one(q: Array, k: Array, v: Array, o: Array, sums: Array, do: Array) -> Any:
        kept = (q, k, v, None, None, o, sums, attend.dq_mask_info, attend.dkv_mask_info)
        return splash._splash_attention_bwd(**attend.kwargs, res=kept, do=do)[3:6]

    q, k, v, o, do = _padded(_scaled(query), key, value, mixed, gradient)
    found = jax.vmap(of_one)(q, k, v, o, log_sums, do)
    of_query, of_key, of_value = (array[..., : query.shape[-1]] for array in found)
    return of_query * query.shape[-1] ** -0.5, of_key, of_value


def _scaled(query: Array) -> Array:
    return query * query.shape[-1] ** -0.5


def _padded(*arrays: Array) -> list[Array]:
    """With as many channels as the kernels' registers hold: zeros change no product."""
    lacking = -arrays[0].shape[-1] % LANES
    return [jnp.pad(array, [(0, 0)] * 3 + [(0, lacking)]) for array in arrays]


def _kernel(heads: int, tokens: int, *, residuals: bool, interpret: bool) -> Any:
    queries, keys = _divisor(tokens, _QUERIES), _divisor(tokens, _KEYS)
    computed = _divisor(keys, _KEYS_COMPUTED)
    sizes = splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=computed,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    everything = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    return splash.make_splash_mha(
        everything, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=residuals,
        interpret=interpret,
    )  # fmt: skip


def _divisor(tokens: int, most: int) -> int:
    """The largest number of tokens at a time, a multiple of the lanes, that divides them."""
    return max(n for n in range(LANES, min(tokens, most) + 1, LANES) if tokens % n == 0)


_JAX_TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


def computation(
    function: Callable[..., tuple[Array, ...]], tensors: Sequence[Tensor], interpret: bool
) -> Any:
    """A function above as XLA's computation on such tensors; on a CPU where it is interpreted."""
    shapes = tuple((tuple(t.shape), _JAX_TYPES[t.dtype]) for t in tensors)
    return _computation(function, shapes, interpret)


@functools.cache
def _computation(
    function: Callable[..., tuple[Array, ...]], shapes: tuple[Any, ...], interpret: bool
) -> Any:
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    called = functools.partial(function, interpret=interpret)
    lowered = (
        jax.jit(called, keep_unused=True)
        .trace(*given)
        # As for export: in the format before jax 0.7.1's own, which libtpu 0.0.21 does not know.
        .lower(
            lowering_platforms=("cpu" if interpret else "tpu",),
            _private_parameters=mlir.LoweringParameters(for_export=True),
        )
    )
    proto = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xb.computation_from_module_proto(function.__name__, proto)
