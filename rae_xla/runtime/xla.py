"""The XLA backend: one SPMD program over every chip of a TPU pod, or over virtual CPU devices."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla._internal import tpu

from rae_xla.runtime.hosts import Hosts
from rae_xla.runtime.interface import Batch, Fn
from rae_xla.runtime.layer_norm import keep_norms_on_rows
from rae_xla.runtime.mesh import AXES, resolve_mesh
from rae_xla.runtime.sharding import FSDP_RULES, PartitionSpec, partition_spec


def on_tpu() -> bool:
    """Whether this machine has TPU chips."""
    return tpu.num_available_chips() > 0


class XLARuntime:
    """See ``Runtime``. Must be made before anything else touches an XLA device."""

    backend = "xla"

    def __init__(
        self,
        *,
        data: int,
        fsdp: int,
        precision: str,
        seed: int,
        devices: int | None,
        compile_cache: str | None,
    ) -> None:
        if not on_tpu():
            os.environ.setdefault("PJRT_DEVICE", "CPU")
            if devices is not None:
                os.environ["CPU_NUM_DEVICES"] = str(devices)
        if compile_cache:
            xr.initialize_cache(compile_cache, readonly=False)
        xr.use_spmd()
        self.device = torch_xla.device()
        self.process_index = xr.process_index()
        self.process_count = xr.process_count()
        master = "localhost"
        if self.process_count > 1 and on_tpu() and "MASTER_ADDR" not in os.environ:
            master = tpu.discover_master_worker_ip()
        self._hosts = Hosts(self.process_index, self.process_count, master)
        count = xr.global_runtime_device_count()
        self.mesh = resolve_mesh(data, fsdp, count)
        self._mesh = xs.Mesh(np.arange(count), (self.mesh.data, self.mesh.fsdp), AXES)
        xs.set_global_mesh(self._mesh)
        self._precision = precision
        if precision == "fp32":  # a TPU's default is one bf16 pass
            torch_xla.backends.set_mat_mul_precision("highest")
        self.description = (
            f"{count} XLA devices ({xr.device_type()}), mesh data={self.mesh.data} x "
            f"fsdp={self.mesh.fsdp}, {precision}"
        )
        torch.manual_seed(seed)

    def _send(self, host: Tensor, spec: PartitionSpec | tuple[Any, ...], *, rows: bool) -> Tensor:
        """One transfer straight to the shards: no device ever holds the whole tensor."""
        sharding = None
        if any(spec):
            minibatch = rows and self.process_count > 1
            sharding = xs.ShardingSpec(self._mesh, spec, minibatch=minibatch)
        [placed] = cast("list[Tensor]", xm.send_cpu_data_to_device([host], self.device, sharding))
        return placed

    def place(self, module: nn.Module) -> nn.Module:
        """Replace parameters and buffers on the host by sharded ones on the devices.

        What is on the devices stays as it is: an optimizer may hold it.
        """
        waiting = {n: p for n, p in module.named_parameters() if p.device != self.device}
        placed = self.place_tensors({name: p.detach() for name, p in waiting.items()})
        for name, parameter in waiting.items():
            owner, _, last = name.rpartition(".")
            moved = nn.Parameter(placed[name], requires_grad=parameter.requires_grad)
            module.get_submodule(owner).register_parameter(last, moved)
        for child in module.modules():
            for name, buffer in list(child.named_buffers(recurse=False)):
                if buffer.device != self.device:
                    child._buffers[name] = self._send(buffer, (), rows=False)
        for owner in {name.rpartition(".")[0] for name in waiting}:
            self._keep_rows_split(module.get_submodule(owner))
        return keep_norms_on_rows(module)

    def _keep_rows_split(self, module: nn.Module) -> None:
        """Tell the compiler that what a layer returns stays split by rows, and its gradient.

        Left to propagate, the weights' sharding spreads to the activations, which are then moved
        between devices at every layer.
        """
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            return

        def annotate(tensor: Tensor) -> Tensor:
            marked = tensor.clone()
            spec = (AXES, *(None,) * (tensor.dim() - 1))
            xs.annotate_custom_sharding(marked, self._mesh, spec)
            return marked

        module.register_forward_hook(lambda _, inputs, output: _BothWays.apply(output, annotate))

    def place_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send host tensors, split by the sharding rules of the names they are given under."""
        sizes = {"data": self.mesh.data, "fsdp": self.mesh.fsdp}
        return {
            name: self._send(
                tensor, partition_spec(name, tensor.shape, FSDP_RULES, sizes), rows=False
            )
            for name, tensor in tensors.items()
        }

    def put(self, batch: Mapping[str, Tensor]) -> Batch:
        """Send this process's rows; together the processes make the global batch."""
        return {
            name: self._send(t, (AXES, *(None,) * (t.dim() - 1)) if t.dim() else (), rows=True)
            for name, t in batch.items()
        }

    def compile(self, fn: Fn) -> Fn:
        """One graph per call; what would break it in two is an error.

        ``torch_xla.compile`` with ``full_graph`` does this too, but waits for the devices before it
        traces. Here a step is traced while the one before it still computes.
        """

        @functools.wraps(fn)
        def call(*inputs: Any) -> Any:
            torch_xla._XLAC._set_allow_execution(False)
            try:
                outputs = fn(*inputs)
            finally:
                torch_xla._XLAC._set_allow_execution(True)
            torch_xla.sync()
            return outputs

        return cast("Fn", call)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        if self._precision == "bf16":
            return torch.autocast("xla", dtype=torch.bfloat16)
        return nullcontext()

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU."""
        return [result.cpu() for result in results]

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the shards of every tensor together on the host.

        One process holds every shard, so nothing has to be compiled to gather them; several
        processes gather over the interconnect first.
        """
        detached = [tensor.detach() for tensor in tensors.values()]
        if self.process_count > 1:
            return {n: t.cpu() for n, t in zip(tensors, detached, strict=True)}
        xm.wait_device_ops()
        shards = torch_xla._XLAC._get_local_shards(detached)
        places = torch_xla._XLAC._get_local_shard_replica_and_indices(detached)
        return {
            name: _assemble(tensor, [data for data, _ in parts], [index for _, index in where])
            for name, tensor, parts, where in zip(tensors, detached, shards, places, strict=True)
        }

    def synchronize(self) -> None:
        """Wait for the devices."""
        torch_xla.sync()
        xm.wait_device_ops()

    def exchange(self, text: str) -> list[str]:
        """Through a server in process 0, which the TPU's metadata or MASTER_ADDR names."""
        return self._hosts.exchange(text)

    def compilations(self) -> int:
        """How many graphs XLA has compiled."""
        data = met.metric_data("CompileTime")
        return int(data[0]) if data else 0

    def fallbacks(self) -> dict[str, int]:
        """The ``aten::`` counters: operations without a lowering."""
        return {n: met.counter_value(n) for n in met.counter_names() if n.startswith("aten::")}


class _BothWays(torch.autograd.Function):
    """A function applied to a tensor, and to its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.fn = fn
        return fn(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.fn(gradient), None


def _assemble(tensor: Tensor, parts: list[Tensor], places: list[Any]) -> Tensor:
    """A host tensor from its shards and the slices they belong to (... where it is whole)."""
    if places[0] is Ellipsis:
        return parts[0].clone()
    whole = torch.empty(tensor.shape, dtype=parts[0].dtype)
    for part, place in zip(parts, places, strict=True):
        target = whole[tuple(place)]
        target.copy_(part[tuple(slice(size) for size in target.shape)])  # shards may be padded
    return whole
