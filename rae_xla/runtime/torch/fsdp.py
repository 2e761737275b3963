"""FSDP2 by the sharding rules: which parameters are sharded, and which are gathered together.

Parameters that the rules shard become DTensors. FSDP2 gathers those of a block when the block
computes, and reduces their gradients as soon as they are computed, while other blocks compute. If
there is one device for each copy of the state (``fsdp`` of 1), nothing is gathered, and gradients
are averaged over the copies in the same way as DDP does.

Parameters that the rules replicate stay ordinary parameters, the same on every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from rae_xla.runtime.mesh import BATCH, MeshShape
from rae_xla.runtime.sharding import PartitionSpec, Shardings, entry_axes

DATA, FSDP = BATCH

# Layers, with their subclasses, whose parameters ``weight`` and ``bias`` autocast casts to the
# lower precision, here before they are gathered.
_AUTOCAST_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
_AUTOCAST_PARAMETERS = frozenset({"weight", "bias"})


def is_cast_by_autocast(layer: nn.Module, name: str) -> bool:
    """Return whether autocast casts a parameter of a layer where it is first used.

    Others are used in float32 first, such as ``weight_orig`` of a layer with spectral norm, even
    if it is a subclass of ``nn.Conv1d``.

    Args:
        layer: that owns the parameter.
        name: of the parameter in the layer.
    """
    return isinstance(layer, _AUTOCAST_LAYERS) and name in _AUTOCAST_PARAMETERS


def make_device_mesh(shape: MeshShape, device: torch.device) -> DeviceMesh:
    """Return FSDP2's mesh of processes: (data, fsdp), or (fsdp,) for one copy of the state."""
    sizes = shape.axis_sizes
    if sizes[DATA] == 1:
        return init_device_mesh(device.type, (sizes[FSDP],), mesh_dim_names=(FSDP,))
    return init_device_mesh(device.type, (sizes[DATA], sizes[FSDP]), mesh_dim_names=BATCH)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the modules that a network calls one after another, each one FSDP group."""
    lists = (child for child in network.modules() if isinstance(child, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


class NetworkSharder:
    """Shards the networks of a run over its processes.

    Args:
        mesh: of the processes.
        gathered_dtype: dtype in which the weights of linear layers are gathered; None for the
            dtype in which they are stored.
    """

    def __init__(self, mesh: DeviceMesh, gathered_dtype: torch.dtype | None) -> None:
        self._mesh, self._gathered_dtype = mesh, gathered_dtype

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
        for block in reversed(blocks_of(network)):  # blocks within blocks first
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
                    dimension = _fsdp_dimension(stored, parameter.shape[:1], shards)
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
        all_autocast = all(
            is_cast_by_autocast(layer, name)
            for layer in module.modules()
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter in group
        )
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


def sharded_dimensions(module: nn.Module, shardings: Shardings, shards: int) -> dict[str, int]:
    """Return the dimension along which each sharded parameter of a module is sharded, by name.

    Args:
        module: not sharded yet.
        shardings: of the module.
        shards: number of shards; with one, nothing is sharded.
    """
    found = {
        name: _fsdp_dimension(shardings.parameters[name].stored, parameter.shape[:1], shards)
        for name, parameter in module.named_parameters()
        if shards > 1
    }
    return {name: dimension for name, dimension in found.items() if dimension is not None}


def _fsdp_dimension(stored: PartitionSpec, rows: Sequence[int], shards: int) -> int | None:
    """Return the dimension along which FSDP2 shards a parameter; None if it is replicated.

    The rules decide whether it is sharded. FSDP2 gathers shards of the first dimension in place,
    but copies those of any other once more, before and after each communication; so the first is
    preferred where it divides evenly, whichever the rules name.

    Args:
        stored: spec of the rules.
        rows: size of the first dimension; empty for a 0-d parameter.
        shards: number of shards.
    """
    found = [dimension for dimension, entry in enumerate(stored) if FSDP in entry_axes(entry)]
    if not found:
        return None
    return 0 if rows[0] % shards == 0 else found[0]
