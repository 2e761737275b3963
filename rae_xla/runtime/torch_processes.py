"""The torch backend over several processes: a GPU each (NCCL), or a CPU each (gloo)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rae_xla.errors import UserError
from rae_xla.runtime import process_group
from rae_xla.runtime.interface import Fn
from rae_xla.runtime.launch import Launch
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.runtime.sharding import find_networks
from rae_xla.runtime.snapshot import HostShard, HostTensor
from rae_xla.runtime.torch import TorchRuntime
from rae_xla.runtime.torch_sharding import DATA, FSDP, Splitting, make_device_mesh

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig


class TorchProcesses(TorchRuntime):
    """See ``Runtime``. Each process computes with its own rows of the batch, and has its own part
    of the state: DTensors, of which ``parts`` gives what is here.

    With ``compile_graphs`` the blocks of the networks are compiled, each by itself: between them
    FSDP2 gathers weights.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        mesh: MeshConfig,
        precision: str,
        compile_graphs: bool,
        seed: int,
        remat: float = 0.0,
    ) -> None:
        self.process_index, self.process_count = launch.index, launch.count
        device = process_group.choose_device(launch)
        super().__init__(
            mesh=mesh,
            precision=precision,
            compile_graphs=compile_graphs,
            seed=seed,
            remat=remat,
        )
        self.device = device
        process_group.join(device)
        self._mesh = make_device_mesh(self.mesh, device)
        lowered = torch.bfloat16 if precision == "bf16" else None
        self._splitting = Splitting(self._mesh, lowered, compile_blocks=compile_graphs)

    def _resolve(self, mesh: MeshConfig) -> MeshShape:
        shape = resolve_mesh(mesh, self.process_count)
        if shape.tensor > 1:
            raise UserError(
                f"mesh.ici.tensor is {shape.tensor}: the torch backend splits no layers (the xla "
                "backend does); set it to 1 and give its devices to mesh.ici.fsdp"
            )
        return shape

    def _describe(self, name: str) -> str:
        return f"{self.process_count} torch devices ({name}), mesh {self.mesh}, {self._precision}"

    def place(self, module: nn.Module) -> nn.Module:
        """Split networks by the rules, and move what stays whole to the device.

        A network is to be split before what holds it computes. What is placed stays as it is.
        """
        shardings = self._shardings(module)
        if self._remat:
            self._rematerialise(module, shardings)
        for name in reversed(find_networks(module, self._rules)):
            self._splitting.apply(module.get_submodule(name), shardings, name)
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(self.device)
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                child._buffers[name] = buffer.to(self.device)
        return module

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Move the parts that are this process's, split as the parameters of the same names."""
        parameters = dict(like.named_parameters())
        return {name: self._split(t, parameters[name]) for name, t in tensors.items()}

    def _split(self, tensor: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return tensor.to(self.device, copy=True)
        # Every process has the whole: nothing is sent.
        split = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
        return split.clone()  # a part alone, not a view of the whole

    def compile(self, fn: Fn) -> Fn:
        """As it is: the blocks in it are compiled already."""
        return fn

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Over the processes, each of which was given as many rows."""
        return process_group.mean(values)

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """FSDP2 has averaged those of what it gathers; the others are averaged here."""
        gradients = super().gradients(parameters)
        averaged = iter(self.average([g for g in gradients if not isinstance(g, DTensor)]))
        return [g if isinstance(g, DTensor) else next(averaged) for g in gradients]

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of split tensors the squares of all parts are added, of others they are everywhere."""
        squares = self._squares([t.to_local() for t in tensors if isinstance(t, DTensor)])
        dist.all_reduce(squares, group=self._mesh[FSDP].get_group())
        whole = self._squares([t for t in tensors if not isinstance(t, DTensor)])
        return (squares + whole).sqrt()

    def _squares(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros((), device=self.device)
        return torch.stack(torch._foreach_norm(list(tensors))).square().sum()

    @torch.no_grad()
    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The local part of each."""
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a DTensor are put together, and the rows of all processes. What has no rows
        is the same everywhere.
        """
        return super().to_host({name: _whole(t.detach()) for name, t in tensors.items()})

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """The parts that are here, each in the first process that has it."""
        return {name: self._host_tensor(t.detach()) for name, t in tensors.items()}

    def _host_tensor(self, tensor: Tensor) -> HostTensor:
        shape, offsets = tuple(tensor.shape), [0] * tensor.dim()
        first = self.process_index == 0
        if isinstance(tensor, DTensor):
            first = DATA not in self._axes or self._mesh.get_local_rank(DATA) == 0
            [dimension] = [p.dim for p in tensor.placements if isinstance(p, Shard)]
            tensor = tensor.to_local()
            offsets[dimension] = self._mesh.get_local_rank(FSDP) * tensor.shape[dimension]
        if not first:
            return HostTensor(shape, ())
        return HostTensor(shape, (HostShard(tensor.to("cpu", copy=True), tuple(offsets)),))

    @property
    def _axes(self) -> tuple[str, ...]:
        return tuple(self._mesh.mesh_dim_names or ())

    def saving_group(self) -> Any:
        """A gloo group beside the one that trains."""
        return process_group.new_group()

    def exchange(self, text: str) -> list[str]:
        """Among the CPUs."""
        return process_group.exchange(text)


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return process_group.gather_rows(tensor) if tensor.dim() else tensor
