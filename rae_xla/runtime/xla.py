"""The XLA backend: one SPMD program over every chip of a TPU pod, or over virtual CPU devices."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.debug.profiler as xp
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla._internal import tpu
from torch_xla.distributed.spmd.xla_sharding import ShardingType, _get_group_assignment

from rae_xla.runtime.chips import Chip, Memory, known_chip
from rae_xla.runtime.compile_cache import cache_warnings, open_cache
from rae_xla.runtime.hosts import Hosts
from rae_xla.runtime.interface import Batch, Fn
from rae_xla.runtime.layer_norm import keep_norms_on_rows
from rae_xla.runtime.mesh import AXES, BATCH, MeshShape, resolve_mesh
from rae_xla.runtime.remat import rematerialise
from rae_xla.runtime.sharding import (
    PartitionSpec,
    load_rules,
    resolve_shardings,
    shard_count,
    without_single_axes,
)
from rae_xla.runtime.snapshot import HostShard, HostTensor
from rae_xla.runtime.stacked import cut_snapshot, cut_up, names_in, put_together
from rae_xla.runtime.whole import WholeBatch
from rae_xla.runtime.xla_flash import FlashAttention, tokens_from, use_flash
from rae_xla.runtime.xla_gathering import Gathering
from rae_xla.runtime.xla_recompute import recompute
from rae_xla.runtime.xla_scan import scan_alike

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig


LEAST_THREADS = 8
"""Of XLA on a CPU where bits count. It adds up a product in an order that depends on how many
threads it has: as many as there are cores, or devices if those are more.
"""


def on_tpu() -> bool:
    """Whether this machine has TPU chips."""
    return tpu.num_available_chips() > 0


class XLARuntime(WholeBatch):
    """See ``Runtime``. Must be made before anything else touches an XLA device."""

    backend = "xla"

    def __init__(
        self,
        *,
        mesh: MeshConfig,
        precision: str,
        remat: float,
        scan: bool,
        attention: str,
        seed: int,
        devices: int | None,
        compile_cache: str | None,
        same_bits: bool,
    ) -> None:
        if not on_tpu():
            os.environ.setdefault("PJRT_DEVICE", "CPU")
            if same_bits:
                threads = max(LEAST_THREADS, os.cpu_count() or 1)
                os.environ.setdefault("PJRT_NPROC", str(threads))
            if devices is not None:
                os.environ["CPU_NUM_DEVICES"] = str(devices)
        if compile_cache:
            open_cache(compile_cache, tpu.worker_id() if on_tpu() else 0)
        xr.use_spmd()
        self.device = torch_xla.device()
        self.process_index = xr.process_index()
        self.process_count = xr.process_count()
        master = "localhost"
        if self.process_count > 1 and on_tpu() and "MASTER_ADDR" not in os.environ:
            master = tpu.discover_master_worker_ip()
        self._hosts = Hosts(self.process_index, self.process_count, master)
        count = xr.global_runtime_device_count()
        self.mesh = resolve_mesh(mesh, count)
        self._rules = load_rules(mesh.sharding)
        self._mesh = _device_mesh(self.mesh)
        xs.set_global_mesh(self._mesh)
        self._gathering = Gathering(self._mesh)
        self._remat, self._scan = remat, scan
        self._precision = precision
        self.choose_attention(attention, tpu=on_tpu())
        if precision == "fp32":  # a TPU's default is one bf16 pass
            torch_xla.backends.set_mat_mul_precision("highest")
        devices_here = f"{count} XLA device{'s' * (count > 1)} ({xr.device_type()})"
        self.description = f"{devices_here}, mesh {self.mesh}, {precision}"
        torch.manual_seed(seed)

    def choose_attention(self, setting: str, *, tpu: bool) -> None:
        """From now on attention is what ``runtime.attention`` says, where the run is on TPUs."""
        least = tokens_from(setting, self._precision, tpu=tpu)
        use_flash(None if least is None else FlashAttention(self._mesh, self.mesh, least))

    @property
    def on_cpu(self) -> bool:
        """Without TPUs."""
        return not on_tpu()

    def _send(self, host: Tensor, spec: PartitionSpec, *, rows: bool = False) -> Tensor:
        """One transfer straight to the shards: no device ever holds the whole tensor."""
        sharding = None
        if any(spec):
            sharding = self._sharding(spec, minibatch=rows and self.process_count > 1)
        [placed] = cast("list[Tensor]", xm.send_cpu_data_to_device([host], self.device, sharding))
        return placed

    def _sharding(self, spec: PartitionSpec, *, minibatch: bool) -> xs.ShardingSpec:
        sharding = xs.ShardingSpec(self._mesh, spec, minibatch=minibatch)
        parts = math.prod(shard_count(entry, self.mesh.axis_sizes) for entry in spec)
        if None not in spec and parts < self.mesh.size:
            # torch_xla 2.9 takes a spec without None for one that names every axis of the mesh.
            sharding._sharding_type = ShardingType.PARTIAL
            sharding._group_assignment, sharding._replication_groups = _get_group_assignment(
                ShardingType.PARTIAL, np.array(sharding._tile_assignment), len(spec), set()
            )
        return sharding

    def place(self, module: nn.Module) -> nn.Module:
        """Replace parameters and buffers on the host by sharded ones on the devices.

        What is on the devices stays as it is: an optimizer may hold it.
        """
        shardings = resolve_shardings(module, self._rules, self.mesh.axis_sizes)
        self._gathering.apply(module, shardings)
        blocks = {name: module.get_submodule(name) for name in shardings.blocks}
        here = {name: block for name, block in blocks.items() if self._waits(block)}
        single = list(here.values())
        if self._scan:
            single = scan_alike(module, here, self._remat, self._gathering.tracing)
            shardings = resolve_shardings(module, self._rules, self.mesh.axis_sizes)
        trained = [b for b in single if any(p.requires_grad for p in b.parameters())]
        rematerialise(trained, self._remat, recompute)
        for name, parameter in list(module.named_parameters()):
            if parameter.device != self.device:
                owner, _, last = name.rpartition(".")
                stored = self._send(parameter.detach(), shardings.parameters[name].stored)
                moved = nn.Parameter(stored, requires_grad=parameter.requires_grad)
                module.get_submodule(owner).register_parameter(last, moved)
        for child in module.modules():
            for name, buffer in list(child.named_buffers(recurse=False)):
                if buffer.device != self.device:
                    child._buffers[name] = self._send(buffer, ())
        return keep_norms_on_rows(module)

    def _waits(self, block: nn.Module) -> bool:
        return any(parameter.device != self.device for parameter in block.parameters())

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Send host tensors, split as the parameters they belong to, and stacked as they are."""
        stored = resolve_shardings(like, self._rules, self.mesh.axis_sizes).parameters
        whole = put_together(tensors, (n for n in stored if tensors.keys() >= set(names_in(n))))
        return {name: self._send(tensor, stored[name].stored) for name, tensor in whole.items()}

    def put(self, batch: Mapping[str, Tensor]) -> Batch:
        """Send this process's rows; together the processes make the global batch."""
        split = without_single_axes((BATCH,), self.mesh.axis_sizes)
        return {
            name: self._send(t, split + (None,) * (t.dim() - 1) if t.dim() else (), rows=True)
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

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all elements, without one for each tensor: half the operations."""
        return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU."""
        return [result.cpu() for result in results]

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Copied when it is asked for, which waits for nothing else."""
        return result.cpu

    def own_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """The rows of all results that lie on this process's devices. Waits for the devices: shards
        cannot be had while anything is in flight.
        """
        detached = [tensor.detach() for tensor in tensors.values()]

        def wait() -> dict[str, Tensor]:
            xm.wait_device_ops()
            shards = torch_xla._XLAC._get_local_shards(detached)
            places = torch_xla._XLAC._get_local_shard_replica_and_indices(detached)
            rows = [_rows_by_place(*both) for both in zip(shards, places, strict=True)]
            common = sorted(set.intersection(*map(set, rows)))
            return {
                name: torch.stack([found[place] for place in common])
                for name, found in zip(tensors, rows, strict=True)
            }

        return wait

    def beside(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The devices do one thing after the other; the host is ahead of them anyway."""
        return nullcontext()

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the shards of every tensor together on the host.

        One process holds every shard, so nothing has to be compiled to gather them; several
        processes gather over the interconnect first.
        """
        detached = [tensor.detach() for tensor in tensors.values()]
        if self.process_count > 1:
            return cut_up({n: t.cpu() for n, t in zip(tensors, detached, strict=True)})
        xm.wait_device_ops()
        shards = torch_xla._XLAC._get_local_shards(detached)
        places = torch_xla._XLAC._get_local_shard_replica_and_indices(detached)
        found = zip(tensors, detached, shards, places, strict=True)
        return cut_up(
            {
                name: _assemble(tensor, [data for data, _ in parts], [index for _, index in where])
                for name, tensor, parts, where in found
            }
        )

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """The shards of this process's devices, one of each that several devices hold a copy of."""
        detached = [tensor.detach() for tensor in tensors.values()]
        xm.wait_device_ops()
        shards = torch_xla._XLAC._get_local_shards(detached)
        places = torch_xla._XLAC._get_local_shard_replica_and_indices(detached)
        found = zip(tensors, detached, shards, places, strict=True)
        return cut_snapshot(
            {
                name: HostTensor(tuple(tensor.shape), tuple(_first_replicas(tensor, parts, where)))
                for name, tensor, parts, where in found
            }
        )

    def saving_group(self) -> Any | None:
        """A gloo group; the processes find each other as they do for ``exchange``."""
        return self._hosts.new_group()

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

    def chip(self) -> Chip | None:
        """By the accelerator type that the machine's metadata tell."""
        return _tpu_chip() if on_tpu() else None

    def memory(self) -> Memory | None:
        """What libtpu tells of this host's chips; there is no peak among it.

        ``xm.get_memory_info`` does not know SPMD's devices (pytorch/xla issue 9022).
        """
        if not on_tpu():
            return None
        try:
            from libtpu.sdk import tpumonitoring

            used = tpumonitoring.get_metric("hbm_capacity_usage").data()
            total = tpumonitoring.get_metric("hbm_capacity_total").data()
            return Memory(max(map(int, used)), None, min(map(int, total)))
        except Exception:  # a figure in the log is not worth a run
            return None

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """By the profiler of XLA, which records the devices' side too."""
        folder.mkdir(parents=True, exist_ok=True)
        xp.start_trace(str(folder))
        try:
            yield
            self.synchronize()
        finally:
            xp.stop_trace()

    def warnings(self) -> list[str]:
        """That the cache of compiled programs does not work, where it does not."""
        return cache_warnings()


@functools.cache
def _tpu_chip() -> Chip | None:
    try:
        return known_chip(tpu.get_tpu_type())
    except (OSError, KeyError, TypeError):  # no metadata, or none about a TPU
        return None


def _device_mesh(shape: MeshShape) -> xs.Mesh:
    """The devices in the order of their numbers; with slices, as they are wired.

    Axes of one device are left out: torch_xla 2.9 cannot send a vector to a mesh that has any.
    """
    axes = [axis for axis in AXES if shape.axis_sizes[axis] > 1] or [BATCH[0]]
    if shape.slices > 1 and "slice_index" in xr.global_runtime_device_attributes()[0]:
        within = tuple(getattr(shape, axis) for axis in axes)
        across = tuple(shape.slices if axis == BATCH[0] else 1 for axis in axes)
        return xs.HybridMesh(ici_mesh_shape=within, dcn_mesh_shape=across, axis_names=tuple(axes))
    sizes = tuple(shape.axis_sizes[axis] for axis in axes)
    return xs.Mesh(np.arange(shape.size), sizes, tuple(axes))


def _rows_by_place(
    parts: list[tuple[Tensor, str]], places: list[tuple[int, Any]]
) -> dict[int, Tensor]:
    """The rows that lie here, by their places in the whole tensor."""
    rows: dict[int, Tensor] = {}
    for (part, _), (_, place) in zip(parts, places, strict=True):
        start = 0 if place is Ellipsis else place[0].start
        rows.update(enumerate(part.unbind(), start))
    return rows


def _first_replicas(
    tensor: Tensor, parts: list[tuple[Tensor, str]], places: list[tuple[int, Any]]
) -> Iterator[HostShard]:
    """Of the shards that lie here (copies already, each with its device), those with which the
    replicas of each begin; without their padding.
    """
    for (part, _), (replica, place) in zip(parts, places, strict=True):
        if replica:
            continue
        if place is Ellipsis:
            yield HostShard(part, (0,) * tensor.dim())
            continue
        sizes = [where.stop - where.start for where in place]
        if all(size > 0 for size in sizes):
            cut = part[tuple(slice(size) for size in sizes)]
            yield HostShard(cut, tuple(where.start for where in place))


def _assemble(tensor: Tensor, parts: list[Tensor], places: list[Any]) -> Tensor:
    """A host tensor from its shards and the slices they belong to (... where it is whole)."""
    if places[0] is Ellipsis:
        return parts[0].clone()
    whole = torch.empty(tensor.shape, dtype=parts[0].dtype)
    for part, place in zip(parts, places, strict=True):
        target = whole[tuple(place)]
        target.copy_(part[tuple(slice(size) for size in target.shape)])  # shards may be padded
    return whole
