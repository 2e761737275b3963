"""Lowering of jax functions to XLA computations for torch_xla's graphs.

Requires jax 0.7.1, the version that torch_xla 2.9 is built against; ``flash_attention`` checks it.
The private ``mlir.LoweringParameters(for_export=True)`` has no public replacement: it selects a
format of the program that libtpu 0.0.21 can read.
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
from torch import Tensor

# jax only creates constants. The TPU devices must stay free for torch_xla.
jax.config.update("jax_platforms", "cpu")

_JAX_TYPES = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16}


def computation(
    function: Callable[..., tuple[Array, ...]],
    tensors: Sequence[Tensor],
    *,
    interpret: bool,
    **options: bool,
) -> Any:
    """Lower a jax function to an XLA computation.

    Args:
        function: called with an array for each tensor, ``interpret`` and ``options``.
        tensors: its arguments, of which shapes and dtypes count.
        interpret: lower for a CPU instead of a TPU.
        options: further keyword arguments.
    """
    shapes = tuple((tuple(t.shape), _JAX_TYPES[t.dtype]) for t in tensors)
    return _computation(function, shapes, interpret, tuple(sorted(options.items())))


@functools.cache
def _computation(
    function: Callable[..., tuple[Array, ...]],
    shapes: tuple[Any, ...],
    interpret: bool,
    options: tuple[tuple[str, bool], ...],
) -> Any:
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    called = functools.partial(function, interpret=interpret, **dict(options))
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
