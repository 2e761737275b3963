"""FSDP by annotation: weights are stored sharded, and gathered where a layer computes with them.

A layer annotates its weight where it uses it. Under autocast the shard is cast first, so that bf16
is sent; the gradient is annotated like the stored weight, which makes it a reduce-scatter. Without
these annotations the sharding of the weights propagates to the activations, which are then moved
between devices at every layer.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.models.layers import FusedLinear
from rae_xla.runtime.sharding import PartitionSpec, Placement, Shardings
from rae_xla.runtime.xla.linear import ShardedLinear
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh, annotated


class ShardingAnnotator:
    """Makes modules annotate their weights and outputs.

    The ``forward`` of a layer is replaced on the instance: its class, parameters and state-dict
    keys stay as they are.

    Args:
        mesh: of the run.
    """

    def __init__(self, mesh: SpmdMesh) -> None:
        self._mesh = mesh
        self._annotated: WeakSet[nn.Module] = WeakSet()

    def apply(self, module: nn.Module, shardings: Shardings) -> None:
        """Replace the forward of layers and register hooks; skip modules that have them."""
        for name, child in module.named_modules():
            if child in self._annotated:
                continue
            self._annotated.add(child)
            placement = shardings.parameters.get(f"{name}.weight" if name else "weight")
            if placement is not None and any(placement.stored):
                self._gather_weight(child, placement)
            if any(shardings.activations.get(name, ())):
                self._annotate_output(child, shardings.activations[name])

    def _gather_weight(self, module: nn.Module, placement: Placement) -> None:
        """Replace the forward of a linear, embedding or convolution layer.

        Other layers, and subclasses, use their weight in a way that is not known here.
        """
        layer: Any = module
        forward: Any
        if type(module) is nn.Linear:
            forward = partial(_linear, layer, ShardedLinear(self._mesh, placement, 1))
        elif type(module) is FusedLinear:
            forward = partial(_fused, layer, ShardedLinear(self._mesh, placement, module.parts))
        elif type(module) is nn.Embedding:
            forward = partial(_embedding, layer, GatheredWeight(self._mesh, placement))
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            forward = partial(_conv2d, layer, GatheredWeight(self._mesh, placement))
        else:
            return
        layer.forward = forward

    def _annotate_output(self, module: nn.Module, spec: PartitionSpec) -> None:
        annotate = self._mesh.annotation(spec)

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(annotated(part, annotate, annotate) for part in output)
            return annotated(output, annotate, annotate)

        module.register_forward_hook(hook)


class GatheredWeight:
    """Gathers a stored weight, in the dtype of autocast."""

    def __init__(self, mesh: SpmdMesh, placement: Placement) -> None:
        self._as_used, self._as_stored = (
            mesh.annotation(placement.used),
            mesh.annotation(placement.stored),
        )

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the weight as a layer computes with it; its gradient is sharded as stored."""
        if torch.is_autocast_enabled(weight.device.type):
            weight = self._as_stored(weight.to(torch.get_autocast_dtype(weight.device.type)))
        return annotated(weight, self._as_used, self._as_stored)


def _linear(layer: nn.Linear, sharded: ShardedLinear, input: Tensor) -> Tensor:
    [result] = sharded(input, layer.weight, layer.bias)
    return result


def _fused(
    layer: FusedLinear, sharded: ShardedLinear, x: Tensor, heads: int | None = None
) -> tuple[Tensor, ...]:
    """Compute the product of each layer by itself.

    Splitting the weight is cheap. Splitting the output would make the backward pass concatenate
    its gradients in memory, a tenth of a block's memory traffic.
    """
    return sharded(x, layer.weight, layer.bias, heads)


def _embedding(layer: nn.Embedding, gathered: GatheredWeight, input: Tensor) -> Tensor:
    return F.embedding(input, gathered(layer.weight))


def _conv2d(layer: nn.Conv2d, gathered: GatheredWeight, input: Tensor) -> Tensor:
    return F.conv2d(
        input,
        gathered(layer.weight),
        layer.bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )
