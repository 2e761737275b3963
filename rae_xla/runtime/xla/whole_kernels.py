"""Attention kernels in Pallas for sequences whose score matrix fits into on-chip memory.

A block holds all tokens of a few heads of one image, so that no sum is carried between blocks and
the scores are never written to HBM. The backward kernel computes them again: nothing but the
inputs is saved. Queries and keys can be rotated by their position within the kernels, so that the
rotated ones are not written to HBM either.

Arrays are (B, heads, d, N), tokens last. In this order no number of channels that is a multiple of
8 needs padding (72 channels in the last dimension would be padded to 128), sums over keys add
vector registers instead of reducing within them, and XLA computes queries, keys and values in this
layout anyway: the transposition costs no copy.

Requires jax 0.7.1, see ``flash_kernels``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MAX_TOKENS = 512
"""The float32 scores of a head then take 1 MiB; on-chip memory holds 16 MiB of a program's."""

SUBLANES = 8
"""Height of a TPU vector register: channels are processed in multiples of it."""

_SCORES_PER_BLOCK = 4 * 256 * 256
"""Scores of one block: more hide the start of a block better, but compile longer."""


def whole_result(
    query: Array, key: Array, value: Array, *tables: Array, interpret: bool
) -> tuple[Array, ...]:
    """Compute attention of (B, heads, N, d) arrays; return a tuple of the result alone.

    ``tables`` are none, or the three (N, d) of ``ops.rotary.apply_rope``.
    """
    arrays = query, key, value
    return _call(_result_kernel, "whole_attention_fwd", 2, 1, arrays, tables, interpret)


def whole_gradients(
    query: Array, key: Array, value: Array, gradient: Array, *tables: Array, interpret: bool
) -> tuple[Array, ...]:
    """Return the gradients of query, key and value.

    Args:
        query: (B, heads, N, d), like all arrays.
        key: an input of ``whole_result``.
        value: an input of ``whole_result``.
        gradient: of its result.
        tables: those of ``whole_result``.
        interpret: compute on a CPU.
    """
    arrays = query, key, value, gradient
    return _call(_gradient_kernel, "whole_attention_bwd", 5, 3, arrays, tables, interpret)


def _call(
    kernel: Callable[..., None],
    name: str,
    products: int,
    results: int,
    arrays: Sequence[Array],
    tables: Sequence[Array],
    interpret: bool,
) -> tuple[Array, ...]:
    """Call a kernel on blocks of heads.

    Args:
        kernel: called with references to a block of each array, to each table and to a block of
            each result.
        name: of the kernel.
        products: number of matrix products per head.
        results: number of results.
        arrays: (B, heads, N, d).
        tables: (N, d).
        interpret: compute on a CPU.

    Returns:
        Results like the arrays.
    """
    batch, heads, tokens, channels = arrays[0].shape
    most = max(1, _SCORES_PER_BLOCK // tokens**2)
    together = max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)
    block = pl.BlockSpec((None, together, channels, tokens), lambda b, h: (b, h, 0, 0))
    table = pl.BlockSpec((channels, tokens), lambda b, h: (0, 0))  # read once
    transposed = jax.ShapeDtypeStruct((batch, heads, channels, tokens), arrays[0].dtype)
    scores = batch * heads * tokens**2
    call = pl.pallas_call(
        functools.partial(kernel, rotated=bool(tables)),
        grid=(batch, heads // together),
        in_specs=[block] * len(arrays) + [table] * len(tables),
        out_specs=[block] * results,
        out_shape=[transposed] * results,
        # Without an estimate the compiler counts neither the time nor the traffic of a kernel.
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * channels,
            transcendentals=scores,
            bytes_accessed=(len(arrays) + results) * arrays[0].size * arrays[0].dtype.itemsize
            + sum(array.size * array.dtype.itemsize for array in tables),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=name,
    )
    with jax.named_scope(name):  # the operation's name in the compiled program
        found = call(*(array.swapaxes(-1, -2) for array in (*arrays, *tables)))
    return tuple(array.swapaxes(-1, -2) for array in found)


def _result_kernel(query: Any, key: Any, value: Any, *references: Any, rotated: bool) -> None:
    *tables, result = references
    for head in range(query.shape[0]):
        q, k = query[head], key[head]
        if rotated:
            q, k = _rotate(q, tables), _rotate(k, tables)
        exponentials, scale = _softmax(q, k)
        attended = _product(value[head], exponentials.astype(value.dtype), 1, 0)
        result[head] = (attended * scale).astype(result.dtype)


def _gradient_kernel(
    query: Any, key: Any, value: Any, gradient: Any, *references: Any, rotated: bool
) -> None:
    *tables, q_grad, k_grad, v_grad = references
    temperature = query.shape[1] ** -0.5
    for head in range(query.shape[0]):
        q, k, v = query[head], key[head], value[head]
        if rotated:
            q, k = _rotate(q, tables), _rotate(k, tables)
        # The weights are exponentials * scale. Scaling the gradient of the result, (d, N), takes
        # fewer operations than scaling the exponentials, (N, N).
        exponentials, scale = _softmax(q, k)
        grad = (gradient[head] * scale).astype(v.dtype)
        v_grad[head] = _product(grad, exponentials.astype(v.dtype), 1, 1).astype(v.dtype)
        weight_grad = _product(v, grad, 0, 0)
        weighted_sum = jnp.sum(exponentials * weight_grad, 0, keepdims=True) * scale
        score_grad = (exponentials * (weight_grad - weighted_sum)).astype(q.dtype)
        dq = _product(k, score_grad, 1, 0) * temperature
        dk = _product(q, score_grad, 1, 1) * temperature
        if rotated:
            dq, dk = _rotate_back(dq, tables), _rotate_back(dk, tables)
        q_grad[head], k_grad[head] = dq.astype(q.dtype), dk.astype(q.dtype)


def _rotate(x: Array, tables: Sequence[Any]) -> Array:
    """Rotate pairs of adjacent channels of (d, N), as ``ops.rotary.apply_rope``."""
    cos, sin_next, sin_previous = (table[...] for table in tables)
    x32 = x.astype(jnp.float32)
    rotated = x32 * cos + _shift(x32, -1) * sin_next + _shift(x32, 1) * sin_previous
    return rotated.astype(x.dtype)


def _rotate_back(gradient: Array, tables: Sequence[Any]) -> Array:
    """Return the gradient of ``_rotate``'s input from that of its result; both are float32."""
    cos, sin_next, sin_previous = (table[...] for table in tables)
    following, previous = gradient * sin_next, gradient * sin_previous
    return gradient * cos + _shift(following, 1) + _shift(previous, -1)


def _shift(x: Array, channels: int) -> Array:
    """Move the channels of (d, N) by a number of places, cyclically."""
    return pltpu.roll(x, channels % x.shape[0], 0)


def _softmax(query: Array, key: Array) -> tuple[Array, Array]:
    """Return the softmax over the keys of one head as exponentials and their scale.

    Args:
        query: (d, N).
        key: (d, N).

    Returns:
        float32 (keys, queries), at most 1, and (1, queries): their product is the softmax.
    """
    scores = _product(key, query, 0, 0)
    temperature = query.shape[0] ** -0.5 * math.log2(math.e)
    exponentials = jnp.exp2((scores - jnp.max(scores, 0, keepdims=True)) * temperature)
    return exponentials, 1 / jnp.sum(exponentials, 0, keepdims=True)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contract an axis of each matrix, with a float32 sum."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
