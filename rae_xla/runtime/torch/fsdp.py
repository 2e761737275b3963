"""FSDP2 by the sharding rules: which parameters are sharded, and which are gathered together.

Parameters that the rules shard become DTensors. FSDP2 gathers those of a block when the block
computes, and reduces their gradients as soon as they are computed, while other blocks compute. If
there is one device for each copy of the state (``fsdp`` of 1), nothing is gathered, and gradients
are averaged over the copies in the same way as DDP does.

Parameters that the rules replicate stay ordinary parameters, the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from rae_xla.runtime.mesh import BATCH, MeshShape
from rae_xla.runtime.sharding import PartitionSpec, Shardings, entry_axes

DATA, FSDP = BATCH

# Layers whose weights autocast casts to the lower precision, here before they are gathered.
# The weights of other layers (such as spectral norm) are used in float32 first.
_AUTOCAST_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def make_device_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """Return FSDP2's mesh of processes: (data, fsdp), or (fsdp,) for one copy of the state."""
    sizes = shape.axis_sizes
    if sizes[DATA] == 1:
        return init_device_mesh(device.type, (sizes[FSDP],), mesh_dim_names=(FSDP,))
    return init_device_mesh(device.type, (sizes[DATA], sizes[FSDP]), mesh_dim_names=BATCH)


class NetworkSharder:
    """Shards the networks of a run over its processes.

    Args:
        mesh: of the processes.
        gathered_dtype: dtype in which the weights of linear layers are gathered; None for the
            dtype in which they are stored.
        compile_blocks: whether every block is compiled by itself.
    """

    def __init__(
        self, mesh: DeviceMesh, gathered_dtype: torch.dtype | None, *, compile_blocks: bool
    ) -> None:
        self._mesh, self._gathered_dtype = mesh, gathered_dtype
        self._compile = compile_blocks

    def apply(self, network: nn.Module, shardings: Shardings, prefix: str) -> None:
        """Shard one network in place, with one FSDP group for each block and one for the rest.

        A network that is sharded already stays unchanged.

        Args:
            network: on the CPU, the same on every process.
            shardings: of a module that contains the network.
            prefix: name of the network in that module.
        """
        if any(isinstance(child, FSDPModule) for child in network.modules()):
            return
        dimensions = dict(self._shard_dimensions(network, shardings, prefix))
        blocks = [
            block
            for child in network.modules()
            if isinstance(child, nn.ModuleList)
            for block in child
        ]
        for block in reversed(blocks):  # blocks within blocks first
            if self._compile:
                block.forward = torch.compile(block.forward)
            self._shard(block, dimensions)
        self._shard(network, dimensions)

    def _shard_dimensions(
        self, network: nn.Module, shardings: Shardings, prefix: str
    ) -> Iterator[tuple[nn.Parameter, int]]:
        """Yield the parameters that FSDP2 gathers or reduces, and the dimension that it shards."""
        shards = self._mesh[FSDP].size()
        for name, layer in network.named_modules():
            path = ".".join(filter(None, (prefix, name)))
            for last, parameter in layer.named_parameters(recurse=False):
                stored = shardings.parameters[f"{path}.{last}" if path else last].stored
                if shards > 1:
                    dimension = _fsdp_dimension(stored)
                else:
                    weight = isinstance(layer, _AUTOCAST_LAYERS) and parameter.dim() > 1
                    dimension = 0 if weight and parameter.requires_grad else None
                if dimension is not None:
                    yield parameter, dimension

    def _shard(self, module: nn.Module, dimensions: dict[nn.Parameter, int]) -> None:
        """Make one FSDP group of the parameters of a module that are in no group yet."""
        remaining = {p for p in module.parameters() if not isinstance(p, DTensor)}
        group = remaining & dimensions.keys()
        if not group:
            return
        layers = [m for m in module.modules() if group & set(m.parameters(recurse=False))]
        all_autocast = all(type(layer) in _AUTOCAST_LAYERS for layer in layers)
        dtype = self._gathered_dtype if all_autocast else None
        sharded = fully_shard(
            module,
            mesh=self._mesh,
            # Between steps every module is sharded, the root too, whatever ran last.
            reshard_after_forward=True,
            shard_placement_fn=lambda parameter: Shard(dimensions[parameter]),
            mp_policy=MixedPrecisionPolicy(
                param_dtype=dtype,
                reduce_dtype=torch.float32 if dtype else None,
                cast_forward_inputs=False,  # autocast casts them where necessary
            ),
            ignored_params=remaining - group,
        )
        # gloo has no average, and NCCL's is wrong for groups of one device
        sharded.set_force_sum_reduction_for_comms(True)


def _fsdp_dimension(stored: PartitionSpec) -> int | None:
    """The dimension of a spec that ``fsdp`` shards; None if there is none."""
    found = (dimension for dimension, entry in enumerate(stored) if FSDP in entry_axes(entry))
    return next(found, None)
