"""FSDP2 by the sharding rules: which modules of a network gather their weights together.

The weights that the rules split become DTensors. FSDP2 gathers those of a block when the block
computes, and reduces their gradients as soon as it has them, while other blocks compute. With one
device to a copy of the state (``fsdp`` of 1) there is nothing to gather, and its gradients are
averaged over the copies in the same way: what DDP does.

What the rules keep whole stays an ordinary parameter, the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from rae_xla.runtime.mesh import BATCH, MeshShape
from rae_xla.runtime.sharding import PartitionSpec, Shardings

DATA, FSDP = BATCH

# Layers whose weights autocast casts to the lower precision: of these, the cast weights travel.
# Those of others (a spectral norm's) are worked on in float32 first.
_LOWERED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def make_device_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """The processes as FSDP2 wants them: (data, fsdp), or (fsdp,) where there is one copy."""
    sizes = shape.axis_sizes
    if sizes[DATA] == 1:
        return init_device_mesh(device.type, (sizes[FSDP],), mesh_dim_names=(FSDP,))
    return init_device_mesh(device.type, (sizes[DATA], sizes[FSDP]), mesh_dim_names=BATCH)


class Splitting:
    """Splits the networks of a run over its processes.

    Args:
        mesh: of the processes.
        precision: what the weights of linear layers are gathered in; None: as they are stored.
        compile_blocks: whether blocks are compiled, each by itself.
    """

    def __init__(
        self, mesh: DeviceMesh, precision: torch.dtype | None, *, compile_blocks: bool
    ) -> None:
        self._mesh, self._precision = mesh, precision
        self._compile = compile_blocks

    def apply(self, network: nn.Module, shardings: Shardings, prefix: str) -> None:
        """Split one network in place, a group for each block and one for the rest.

        What is split already stays as it is.

        Args:
            network: on the CPU, the same in every process.
            shardings: of a module that holds it.
            prefix: the network's name there.
        """
        if any(isinstance(child, FSDPModule) for child in network.modules()):
            return
        dimensions = dict(self._split_dimensions(network, shardings, prefix))
        blocks = [
            block for part in network.modules() if isinstance(part, nn.ModuleList) for block in part
        ]
        for block in reversed(blocks):  # those within blocks come first
            if self._compile:
                block.forward = torch.compile(block.forward)
            self._shard(block, dimensions)
        self._shard(network, dimensions)

    def _split_dimensions(
        self, network: nn.Module, shardings: Shardings, prefix: str
    ) -> Iterator[tuple[nn.Parameter, int]]:
        """The parameters that FSDP2 gathers or reduces, and the dimension that is split."""
        parts = self._mesh[FSDP].size()
        for name, layer in network.named_modules():
            path = ".".join(filter(None, (prefix, name)))
            for last, parameter in layer.named_parameters(recurse=False):
                stored = shardings.parameters[f"{path}.{last}" if path else last].stored
                if parts > 1:
                    dimension = _dimension(stored)
                else:
                    weight = isinstance(layer, _LOWERED) and parameter.dim() > 1
                    dimension = 0 if weight and parameter.requires_grad else None
                if dimension is not None:
                    yield parameter, dimension

    def _shard(self, module: nn.Module, dimensions: dict[nn.Parameter, int]) -> None:
        """One group of what in a module is in no group yet."""
        left = {p for p in module.parameters() if not isinstance(p, DTensor)}
        split = left & dimensions.keys()
        if not split:
            return
        layers = [m for m in module.modules() if split & set(m.parameters(recurse=False))]
        lowered = self._precision if all(type(layer) in _LOWERED for layer in layers) else None
        sharded = fully_shard(
            module,
            mesh=self._mesh,
            # Between steps every module has its parts, the root too, whatever ran last.
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: Shard(dimensions[parameter]),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=lowered,
                reduce_dtype=torch.float32 if lowered else None,
                cast_forward_inputs=False,  # autocast does, where it should
            ),
            ignored_params=left - split,
        )
        # gloo knows no averages, and NCCL's are wrong for groups of one device
        sharded.set_force_sum_reduction_for_comms(True)


def _dimension(stored: PartitionSpec) -> int | None:
    """The dimension of a spec that ``fsdp`` splits."""
    for dimension, entry in enumerate(stored):
        if entry == FSDP or (isinstance(entry, tuple) and FSDP in entry):
            return dimension
    return None
