"""The XLA backend: one SPMD program over all chips of a TPU pod, or over virtual CPU devices."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch_xla
import torch_xla.backends
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.debug.profiler as xp
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

from rae_xla.ops import dispatch
from rae_xla.runtime import process_group
from rae_xla.runtime.accelerators import Accelerator, Memory, known_accelerator
from rae_xla.runtime.backend import Batch, Fn, GlobalArithmetic
from rae_xla.runtime.blocks import stack, unstack, unstack_snapshot, unstacked_names
from rae_xla.runtime.mesh import BATCH, resolve_mesh
from rae_xla.runtime.sharding import (
    PartitionSpec,
    load_rules,
    resolve_shardings,
    without_single_axes,
)
from rae_xla.runtime.snapshot import HostTensor
from rae_xla.runtime.xla import compat
from rae_xla.runtime.xla.compile_cache import cache_warnings, can_load_programs, open_cache
from rae_xla.runtime.xla.cross_entropy import register_cross_entropy
from rae_xla.runtime.xla.device_mesh import RowTransfer, make_device_mesh, slice_count
from rae_xla.runtime.xla.flash_attention import (
    FlashAttention,
    describe_attention,
    minimum_tokens,
)
from rae_xla.runtime.xla.fsdp import ShardingAnnotator
from rae_xla.runtime.xla.host_copies import (
    copy_first_replicas,
    copy_full,
    copy_rows,
    gather_full,
)
from rae_xla.runtime.xla.pod import Megascale, check_slices
from rae_xla.runtime.xla.remat import rematerialise
from rae_xla.runtime.xla.replay import CapturedFunction, ReplayCounters, find_fault
from rae_xla.runtime.xla.scan import scan_identical_blocks
from rae_xla.runtime.xla.spmd_mesh import SpmdMesh
from rae_xla.runtime.xla.token_gather import register_token_gather
from rae_xla.runtime.xla.whole_attention import WholeAttention

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RuntimeConfig


logger = logging.getLogger(__name__)

REPRODUCIBLE_THREADS = 8
"""Least number of XLA's CPU threads in runs that must be reproducible to the last bit.

By default XLA has as many threads as there are cores, or virtual devices if those are more, and the
order in which it sums a product depends on that number.
"""


def on_tpu() -> bool:
    """Return whether this machine has TPU chips."""
    return compat.has_tpu()


class XLABackend(GlobalArithmetic):
    """The ``Backend`` of TPUs and of XLA's virtual CPU devices.

    It must be created before anything else uses an XLA device.

    Args:
        runtime: the ``runtime`` section of the configuration.
        mesh: the ``mesh`` section.
        seed: of torch's default generator.
        same_bits: on a CPU, make results independent of the number of virtual devices (see
            ``REPRODUCIBLE_THREADS``).

    Attributes:
        device_mesh: the mesh in torch_xla's terms, without axes of one device.
        replay_counters: how many calls of compiled functions were traced and replayed.
    """

    name = "xla"

    def __init__(
        self, runtime: RuntimeConfig, mesh: MeshConfig, *, seed: int = 0, same_bits: bool = False
    ) -> None:
        if not on_tpu():
            os.environ.setdefault("PJRT_DEVICE", "CPU")
            if same_bits:
                threads = max(REPRODUCIBLE_THREADS, os.cpu_count() or 1)
                os.environ.setdefault("PJRT_NPROC", str(threads))
            if runtime.devices is not None:
                os.environ["CPU_NUM_DEVICES"] = str(runtime.devices)
        self._megascale = Megascale(compat.tpu_metadata if on_tpu() else dict)
        self._compile_cache = runtime.compile_cache
        if runtime.compile_cache and can_load_programs():
            open_cache(runtime.compile_cache, self._host_name())
        xr.use_spmd()
        self.device = torch_xla.device()
        self.process_index = xr.process_index()
        self.process_count = xr.process_count()
        count = xr.global_runtime_device_count()
        self.mesh = resolve_mesh(mesh, count)
        if on_tpu():
            check_slices(self.mesh, slice_count(), self._megascale.num_slices)
        self._join_hosts()
        self._rules = load_rules(mesh.sharding)
        self.device_mesh = make_device_mesh(self.mesh, self._device_owners())
        self._row_transfer: RowTransfer | None = None
        if self.process_count > 1 and self.mesh.tensor > 1:
            local = compat.local_device_numbers()
            self._row_transfer = RowTransfer(self.device_mesh, self.mesh, local)
        xs.set_global_mesh(self.device_mesh)
        self._spmd_mesh = SpmdMesh(self.device_mesh)
        self._annotator = ShardingAnnotator(self._spmd_mesh)
        register_cross_entropy()
        register_token_gather()
        self._remat, self._scan = runtime.remat, runtime.scan
        self.replay_counters = ReplayCounters()
        self._replay = runtime.replay and self._can_replay()
        self._compiled_at_start = _compiled_graphs()
        self._precision = runtime.precision
        self._attention_kernels: list[dispatch.Registration] = []
        self.choose_attention(runtime.attention, tpu=on_tpu())
        if runtime.precision == "fp32":  # the default on TPUs is a single bf16 pass
            torch_xla.backends.set_mat_mul_precision("highest")
        devices = f"{count} XLA device{'s' * (count > 1)} ({xr.device_type()})"
        attention = describe_attention(runtime.attention, runtime.precision, tpu=on_tpu())
        self.description = f"{devices}, mesh {self.mesh}, {runtime.precision}, {attention}"
        torch.manual_seed(seed)

    def _host_name(self) -> str:
        """A name of this host that no other host of the run has."""
        worker = compat.tpu_worker_id() if on_tpu() else 0
        slices = (self._megascale.num_slices or 1) > 1
        return f"slice-{self._megascale.slice_id}-host-{worker}" if slices else f"host-{worker}"

    def _can_replay(self) -> bool:
        fault = find_fault(lambda host: self.send(host, ()))
        if fault is not None:
            logger.warning("runtime.replay is off, since a test of it failed: %s", fault)
        return fault is None

    def _join_hosts(self) -> None:
        address = "localhost"
        if self.process_count > 1 and on_tpu() and "MASTER_ADDR" not in os.environ:
            # Without this, slices of one host each would look for process 0 on their own host.
            address = self._megascale.coordinator or compat.tpu_process_0_address()
        process_group.join_hosts(self.process_index, self.process_count, address)

    def _device_owners(self) -> list[int]:
        """Return the process of each device, by the number of the device."""
        owners = [0] * self.mesh.size
        local = compat.local_device_numbers() if self.process_count > 1 else []
        for process, text in enumerate(process_group.all_gather_text(json.dumps(local))):
            for device in json.loads(text):
                owners[device] = process
        return owners

    def choose_attention(self, setting: str, *, tpu: bool) -> None:
        """Register or remove the attention kernels.

        Args:
            setting: ``runtime.attention``.
            tpu: whether the program is for TPUs; ``rae-xla plan`` compiles for TPUs on a CPU.
        """
        while self._attention_kernels:
            self._attention_kernels.pop().remove()
        tokens = minimum_tokens(setting, self._precision, tpu=tpu)
        if tokens is not None:
            flash = FlashAttention(self._spmd_mesh, tokens)
            self._attention_kernels = [dispatch.register("attention", "xla", flash)]
        if tokens == 0:
            # The latest is tried first: the whole sequence in one block wherever it fits.
            whole = WholeAttention(self._spmd_mesh)
            self._attention_kernels += [
                dispatch.register("attention", "xla", whole),
                dispatch.register("rotary_attention", "xla", whole.rotary),
            ]

    @property
    def on_cpu(self) -> bool:
        """Whether there are no TPUs."""
        return not on_tpu()

    def send(self, host: Tensor, spec: PartitionSpec, *, rows: bool = False) -> Tensor:
        """Transfer a host tensor to the devices, each shard to its own device.

        ``rae-xla plan`` replaces this method to trace a step without data.

        Args:
            host: the full tensor, the same on every process; with ``rows`` this process's rows.
            spec: its sharding, without axes of one device.
            rows: whether the processes together hold the rows of the global tensor.
        """
        if rows and any(spec) and self._row_transfer is not None:
            return self._row_transfer.send(host, spec)
        sharding = None
        if any(spec):
            minibatch = rows and self.process_count > 1
            sharding = compat.sharding_spec(
                self.device_mesh, spec, self.mesh.axis_sizes, minibatch=minibatch
            )
        [placed] = cast("list[Tensor]", xm.send_cpu_data_to_device([host], self.device, sharding))
        return placed

    def place(self, module: nn.Module) -> nn.Module:
        """Replace parameters and buffers on the host by sharded ones on the devices.

        Those on the devices stay, because an optimizer may hold them.
        """
        shardings = resolve_shardings(module, self._rules, self.mesh.axis_sizes)
        self._annotator.apply(module, shardings)
        blocks = {name: module.get_submodule(name) for name in shardings.blocks}
        unplaced = {name: block for name, block in blocks.items() if self._is_unplaced(block)}
        single = list(unplaced.values())
        if self._scan:
            single = scan_identical_blocks(module, unplaced, self._remat, self._spmd_mesh)
            shardings = resolve_shardings(module, self._rules, self.mesh.axis_sizes)
        trained = [b for b in single if any(p.requires_grad for p in b.parameters())]
        rematerialise(trained, self._remat)
        for name, parameter in list(module.named_parameters()):
            if parameter.device != self.device:
                owner, _, last = name.rpartition(".")
                stored = self.send(parameter.detach(), shardings.parameters[name].stored)
                placed = nn.Parameter(stored, requires_grad=parameter.requires_grad)
                module.get_submodule(owner).register_parameter(last, placed)
        for child in module.modules():
            for name, buffer in list(child.named_buffers(recurse=False)):
                if buffer.device != self.device:
                    setattr(child, name, self.send(buffer, ()))
        return module

    def _is_unplaced(self, block: nn.Module) -> bool:
        return any(parameter.device != self.device for parameter in block.parameters())

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Send host tensors, stacked and sharded like the parameters of the same names."""
        stored = resolve_shardings(like, self._rules, self.mesh.axis_sizes).parameters
        names = (name for name in stored if tensors.keys() >= set(unstacked_names(name)))
        stacked = stack(tensors, names)
        return {name: self.send(tensor, stored[name].stored) for name, tensor in stacked.items()}

    def apply_to_matrices(
        self, function: Callable[[Tensor], Tensor], stack: Tensor, dimension: int | None
    ) -> Tensor:
        """Apply a function to matrices, which are divided over all devices.

        The partitioner exchanges the shards of all matrices for some complete ones on each device,
        an all-to-all, and back.
        """
        axes = tuple(self._spmd_mesh.axis_sizes)
        if not axes:
            return function(stack)
        count, devices = len(stack), self._spmd_mesh.shard_count(axes)
        padding = -count % devices
        if padding:
            stack = torch.cat([stack, stack.new_zeros(padding, *stack.shape[1:])])
        annotate = self._spmd_mesh.annotation((axes,))
        result = annotate(function(annotate(stack)))
        return result[:count] if padding else result

    def shard_batch(self, batch: Mapping[str, Tensor]) -> Batch:
        """Send this process's rows; together the processes send the global batch."""
        split = without_single_axes((BATCH,), self.mesh.axis_sizes)
        return {
            name: self.send(t, split + (None,) * (t.dim() - 1) if t.dim() else (), rows=True)
            for name, t in batch.items()
        }

    def compile(self, fn: Fn) -> Fn:
        """Return a function that runs as one program; reading a result inside it is an error.

        It is traced twice for each signature of its arguments and replayed from then on (see
        ``CapturedFunction``); with ``runtime.replay=false`` it is traced at each call.
        """
        captured = CapturedFunction(
            fn,
            self.replay_counters,
            replay=self._replay,
            one_at_a_time=self.on_cpu and self.mesh.size > 1,
        )
        return cast("Fn", captured)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a bf16 autocast context, or one that does nothing for fp32."""
        if self._precision == "bf16":
            return torch.autocast("xla", dtype=torch.bfloat16)
        return nullcontext()

    def full_float32(self) -> AbstractContextManager[None]:
        """Return a context whose products take six passes on TPUs, instead of one in bf16."""
        return compat.matmul_precision("highest")

    def global_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all elements, with half the operations of a norm for each."""
        return torch.stack([(tensor * tensor).sum() for tensor in tensors]).sum().sqrt()

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copy results to the CPU."""
        return [result.cpu() for result in results]

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Return the function that copies a result: copying it waits for nothing else."""
        return result.cpu

    def local_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Return the function that copies the rows. It waits until the devices are idle."""
        detached = {name: tensor.detach() for name, tensor in tensors.items()}

        def wait() -> dict[str, Tensor]:
            xm.wait_device_ops()
            return copy_rows(detached)

        return wait

    def side_stream(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Return a context that does nothing: XLA devices execute programs in order."""
        return nullcontext()

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy full tensors to the CPU.

        A single process has every shard, and nothing is compiled to gather them. Several processes
        gather over the interconnect.
        """
        if self.process_count > 1:
            return unstack(gather_full(tensors, self._spmd_mesh.annotation(())))
        xm.wait_device_ops()
        return unstack(copy_full(tensors))

    def to_host_later(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Return the function that copies the tensors. It waits until the devices are idle."""
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        return lambda: self.to_host(detached)

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Copy the shards of this process's devices, each shard on one process only."""
        xm.wait_device_ops()
        return unstack_snapshot(copy_first_replicas(tensors))

    def checkpoint_group(self) -> Any | None:
        """Create another gloo group."""
        return process_group.new_gloo_group()

    def synchronize(self) -> None:
        """Wait for the devices."""
        torch_xla.sync()
        xm.wait_device_ops()

    def all_gather_text(self, text: str) -> list[str]:
        """Exchange text over the gloo group of the hosts."""
        return process_group.all_gather_text(text)

    def compilations(self) -> int:
        """Return how many graphs XLA has compiled since the backend was started."""
        return _compiled_graphs() - self._compiled_at_start

    def captures(self) -> int:
        """Return how many calls were traced in order to be replayed later."""
        return self.replay_counters.captures

    def fallbacks(self) -> dict[str, int]:
        """Return torch_xla's ``aten::`` counters: operations that XLA has no lowering for."""
        return {n: met.counter_value(n) for n in met.counter_names() if n.startswith("aten::")}

    def accelerator(self) -> Accelerator | None:
        """Return the TPU generation, from the metadata of the machine."""
        return _tpu() if on_tpu() else None

    def memory(self) -> Memory | None:
        """Return what libtpu reports for the chips of this host, which includes no peak.

        ``xm.get_memory_info`` does not support SPMD devices (pytorch/xla issue 9022).
        """
        if not on_tpu():
            return None
        try:
            from libtpu.sdk import tpumonitoring

            used = tpumonitoring.get_metric("hbm_capacity_usage").data()
            total = tpumonitoring.get_metric("hbm_capacity_total").data()
            return Memory(max(map(int, used)), None, min(map(int, total)))
        except Exception:  # a missing metric must not end a run
            return None

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """Record a profile with XLA's profiler, which includes the devices."""
        folder.mkdir(parents=True, exist_ok=True)
        xp.start_trace(str(folder))
        try:
            yield
            self.synchronize()
        finally:
            xp.stop_trace()

    def warnings(self) -> list[str]:
        """Return warnings about a compilation cache that does not work, and about slow products."""
        found = cache_warnings() if self._compile_cache else []
        if on_tpu() and self._precision == "fp32":
            found.append(
                "runtime.precision=fp32 (the default) computes every matrix product on TPUs in six "
                "passes: runtime.precision=bf16 is several times faster"
            )
        return found


def _compiled_graphs() -> int:
    data = met.metric_data("CompileTime")
    return int(data[0]) if data else 0


@functools.cache
def _tpu() -> Accelerator | None:
    try:
        return known_accelerator(compat.tpu_type())
    except (OSError, KeyError, TypeError):  # no metadata, or none about a TPU
        return None
