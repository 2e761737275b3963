"""The torch backend on several processes: one accelerator device, or one CPU, each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rae_xla.errors import UserError
from rae_xla.runtime import process_group
from rae_xla.runtime.accelerators import torch_device
from rae_xla.runtime.backend import Fn
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.runtime.process_group import Launch
from rae_xla.runtime.sharding import find_networks
from rae_xla.runtime.snapshot import HostPart, HostShard, HostTensor
from rae_xla.runtime.torch.backend import TorchBackend, checkpoint_activations, foreach_norm
from rae_xla.runtime.torch.divided_work import apply_divided
from rae_xla.runtime.torch.fsdp import (
    DATA,
    FSDP,
    NetworkSharder,
    blocks_of,
    make_device_mesh,
    sharded_dimensions,
)

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RuntimeConfig


MAX_BLOCK_GRAPHS = 64
"""Most graphs that the blocks of one class are compiled to; PyTorch's default is 8."""


class DistributedTorchBackend(TorchBackend):
    """The ``Backend`` of processes that torchrun started.

    Each process computes on its own rows of the batch and stores its own shards of the state:
    DTensors, whose local shards ``local_shards`` returns. With ``runtime.compile`` every block of a
    network is compiled by itself, because FSDP2 gathers weights between blocks.

    Args:
        launch: place of this process in the run.
        runtime: the ``runtime`` section of the configuration.
        mesh: the ``mesh`` section.
        seed: of torch's default generator.
    """

    def __init__(
        self, launch: Launch, runtime: RuntimeConfig, mesh: MeshConfig, *, seed: int = 0
    ) -> None:
        self.process_index, self.process_count = launch.index, launch.count
        super().__init__(runtime, mesh, seed=seed, device=choose_device(launch))
        if not dist.is_initialized():  # a plan has joined processes that do not exist
            process_group.join_torchrun(self.device)
        self._mesh = make_device_mesh(self.mesh, self.device)
        gathered_dtype = torch.bfloat16 if runtime.precision == "bf16" else None
        self._sharder = NetworkSharder(self._mesh, gathered_dtype)
        if self._compile:
            from rae_xla.runtime.torch.compat import allow_compilations  # imports the compiler

            # Blocks of all networks share the code of a few classes. Each combination of widths,
            # batch size, and training or sampling is one graph; beyond the limit, PyTorch would
            # run the blocks uncompiled without a word.
            allow_compilations(MAX_BLOCK_GRAPHS)

    def _resolve(self, mesh: MeshConfig) -> MeshShape:
        shape = resolve_mesh(mesh, self.process_count)
        if shape.tensor > 1:
            raise UserError(
                f"mesh.ici.tensor is {shape.tensor}, but the torch backend has no tensor "
                "parallelism (the xla backend does): set it to 1 and give its devices to "
                "mesh.ici.fsdp"
            )
        return shape

    def _describe(self, name: str) -> str:
        return f"{self.process_count} torch devices ({name}), mesh {self.mesh}, {self._precision}"

    def place(self, module: nn.Module) -> nn.Module:
        """Shard the networks by the rules, and move replicated parameters to the device.

        A network must be sharded before a module that contains it computes. Parameters that are
        sharded already stay unchanged.
        """
        shardings = self._shardings(module)
        networks = list(find_networks(module, self._rules))
        rematerialised = self._blocks_to_rematerialise(module, shardings)
        if self._compile:
            self._compile_blocks(module.get_submodule(name) for name in networks)
        # A compiled block is checkpointed as a whole. Compiled the other way round, each block
        # would have code of its own, most of it beyond PyTorch's limit of graphs.
        checkpoint_activations(rematerialised)
        for name in reversed(networks):
            self._sharder.apply(module.get_submodule(name), shardings, name)
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.device)
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                setattr(child, name, buffer.to(self.device))
        return module

    def own_parts(self, module: nn.Module) -> dict[str, HostPart]:
        """Return the shards of the parameters that the rules shard."""
        dimensions = sharded_dimensions(module, self._shardings(module), self._mesh[FSDP].size())
        rank, count = self._mesh.get_local_rank(FSDP), self._mesh[FSDP].size()
        parts: dict[str, HostPart] = {}
        for name, dimension in dimensions.items():
            rows = module.get_parameter(name).shape[dimension] // count
            parts[name] = HostPart(dimension, rank * rows, (rank + 1) * rows)
        return parts

    def _compile_blocks(self, networks: Iterable[nn.Module]) -> None:
        """Compile the blocks of networks, once for each block."""
        for network in networks:
            for block in blocks_of(network):
                if "forward" not in vars(block):
                    # A batch size is a constant: each has its own graph, which is the fastest.
                    block.forward = torch.compile(block.forward, dynamic=False)

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Copy this process's shards to the device, by the parameters of the same names."""
        parameters = dict(like.named_parameters())
        return {name: self._shard_like(t, parameters[name]) for name, t in tensors.items()}

    def _shard_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return tensor.to(self.device, copy=True)
        # src_data_rank=None: every process has the full tensor, and nothing is sent.
        sharded = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
        return sharded.clone()  # the shard alone, not a view of the full tensor

    def compile(self, fn: Fn) -> Fn:
        """Return the function itself: the blocks in it are compiled."""
        return fn

    def global_mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Average over the processes, which have equally many rows, with one all-reduce."""
        if not values:
            return []
        flat = torch.cat([value.detach().float().reshape(-1) for value in values])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def global_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return averaged gradients; FSDP2 has averaged those of sharded parameters already."""
        gradients = super().global_gradients(parameters)
        averaged = iter(self.global_mean([g for g in gradients if not isinstance(g, DTensor)]))
        return [g if isinstance(g, DTensor) else next(averaged) for g in gradients]

    def global_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm; the squares of shards are summed over the processes."""
        squares = self._sum_of_squares([t.to_local() for t in tensors if isinstance(t, DTensor)])
        dist.all_reduce(squares, group=self._mesh[FSDP].get_group())
        replicated = self._sum_of_squares([t for t in tensors if not isinstance(t, DTensor)])
        return (squares + replicated).sqrt()

    def _sum_of_squares(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros((), device=self.device)
        return foreach_norm(tensors).square()

    @torch.no_grad()
    def local_shards(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the local shard of each tensor; all of it if it is replicated."""
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    def shard_dimensions(self, tensors: Sequence[Tensor]) -> list[int | None]:
        """Return the sharded dimension of each DTensor; None for one process's tensors."""
        if self._mesh[FSDP].size() == 1:
            return [None] * len(tensors)
        placements = [t.placements[-1] if isinstance(t, DTensor) else None for t in tensors]
        return [placement.dim if isinstance(placement, Shard) else None for placement in placements]

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Apply a function to matrices, which are divided over the ``fsdp`` processes."""
        return apply_divided(function, stack, dimension, self._mesh[FSDP].get_group())

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy full tensors to the CPU.

        The shards of a DTensor and the rows of all processes are gathered. 0-d tensors are the same
        on every process.
        """
        return super().to_host({name: _gather(t.detach()) for name, t in tensors.items()})

    def to_host_later(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Gather full tensors right after their computation, and copy them to the CPU."""
        return super().to_host_later({name: _gather(t.detach()) for name, t in tensors.items()})

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Copy local shards to the CPU, each shard on the first process that has it."""
        return {name: self._host_tensor(t.detach()) for name, t in tensors.items()}

    def _host_tensor(self, tensor: Tensor) -> HostTensor:
        shape, offsets = tuple(tensor.shape), [0] * tensor.dim()
        is_first = self.process_index == 0
        if isinstance(tensor, DTensor):
            is_first = DATA not in self._axes or self._mesh.get_local_rank(DATA) == 0
            [dimension] = [p.dim for p in tensor.placements if isinstance(p, Shard)]
            tensor = tensor.to_local()
            offsets[dimension] = self._mesh.get_local_rank(FSDP) * tensor.shape[dimension]
        if not is_first:
            return HostTensor(shape, ())
        return HostTensor(shape, (HostShard(tensor.to("cpu", copy=True), tuple(offsets)),))

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple(self._mesh.mesh_dim_names or ())

    def checkpoint_group(self) -> Any:
        """Create another gloo group."""
        return process_group.new_gloo_group()

    def all_gather_text(self, text: str) -> list[str]:
        """Exchange text over gloo."""
        return process_group.all_gather_text(text)


def choose_device(launch: Launch) -> torch.device:
    """Return this process's device of the accelerator, and make it current; else the CPU.

    Raises:
        UserError: the host runs more processes than it has devices.
    """
    device = torch_device(launch.local_index)
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    if launch.local_index >= count:
        raise UserError(
            f"this is process {launch.local_index + 1} on this machine, which has {count} "
            f"{device.type} devices: give torchrun --nproc-per-node {count}"
        )
    torch.accelerator.set_device_index(launch.local_index)
    return device


def _gather(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor; else the rows of all processes."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not tensor.dim():
        return tensor
    rows = tensor.contiguous()
    gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows)
    return gathered
