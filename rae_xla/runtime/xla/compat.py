"""Private APIs of torch_xla 2.9.0 and torch 2.9.1 that the XLA backend needs.

This is the only module that calls them, so that an upgrade of torch_xla is a review of this file.
Every function names the public API that is missing. The behaviour was taken from the sources of
torch_xla 2.9.0 (Python in ``distributed/spmd/xla_sharding.py`` and ``_internal/tpu.py``, C++ in
``csrc/init_python_bindings.cpp``) and torch 2.9.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.experimental.scan
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch_xla._internal import tpu
from torch_xla.distributed.spmd.xla_sharding import ShardingType, _get_group_assignment
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

# ------------------------------------------------------------------------------- TPU host metadata


def has_tpu() -> bool:
    """Return whether this machine has TPU chips.

    ``torch_xla.runtime.device_type`` is public, but it initialises the runtime, which must not
    happen before its environment variables are set.
    """
    return tpu.num_available_chips() > 0


def tpu_worker_id() -> int:
    """Return the number of this host within its TPU slice; no public API reads the metadata."""
    return int(tpu.worker_id())


def tpu_type() -> str:
    """Return the accelerator type of this host, such as ``v6e``; no public API reads it.

    Raises:
        OSError: the metadata server does not answer.
        KeyError: the metadata name no accelerator type.
    """
    return str(tpu.get_tpu_type())


def tpu_metadata() -> Mapping[str, object]:
    """Return the ``tpu-env`` entry of this host's metadata; empty if there is none.

    With ``TPU_SKIP_MDS_QUERY`` torch_xla builds it from environment variables instead.
    """
    try:
        return cast("Mapping[str, object]", tpu.get_tpu_env())
    except OSError:  # no metadata server, or no such entry
        return {}


def tpu_process_0_address() -> str:
    """Return the address of the host that runs process 0; call it after ``xr.use_spmd``.

    Processes are not numbered in the order of the hosts. The public ``xla://`` rendezvous uses the
    same function, but it passes no timeout to its store.
    """
    return str(tpu.discover_master_worker_ip())


def local_device_numbers() -> list[int]:
    """Return the numbers of this process's devices in the mesh, in torch_xla's order.

    A mesh numbers the devices of all processes by the numbers in their names, as ``xs.HybridMesh``
    does. The public ``xm.get_xla_supported_devices`` returns the virtual device of SPMD.
    """

    def number(name: str) -> int:
        return int(name.rpartition(":")[2])

    numbers = sorted(map(number, torch_xla._XLAC._xla_get_all_runtime_devices()))
    return [numbers.index(number(name)) for name in torch_xla._XLAC._xla_get_runtime_devices()]


# ------------------------------------------------------------------------------- precision


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of fp32 products of the graphs that are lowered inside the context.

    The public ``torch_xla.backends.set_mat_mul_precision`` logs a warning at every call.

    Args:
        precision: ``default``, ``high`` or ``highest``.
    """
    previous = torch_xla._XLAC._xla_get_mat_mul_precision()
    torch_xla._XLAC._xla_set_mat_mul_precision(precision)
    try:
        yield
    finally:
        torch_xla._XLAC._xla_set_mat_mul_precision(previous)


# ------------------------------------------------------------------------------- tracing


@contextmanager
def execution_forbidden() -> Iterator[None]:
    """Make any execution of a graph inside the context an error.

    ``torch_xla.compile(full_graph=True)`` does this too, but waits for the devices before it
    traces, which would keep the host from tracing a step while the previous one is computed.
    """
    torch_xla._XLAC._set_allow_execution(False)
    try:
        yield
    finally:
        torch_xla._XLAC._set_allow_execution(True)


def tensor_id(tensor: Tensor) -> int:
    """Return torch_xla's identifier of an XLA tensor; most in-place operations change it."""
    return int(torch_xla._XLAC._xla_get_tensor_id(tensor))


def is_xla_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is one of torch_xla's; those of torch's tracers only have its device.

    No public function tells them apart: a fake tensor may be wrapped in a plain one.
    """
    try:
        tensor_id(tensor)
    except RuntimeError:
        return False
    return True


def tensor_handles(tensors: Sequence[Tensor]) -> list[Any]:
    """Return a handle of the device data behind each tensor; equal for equal data."""
    return list(torch_xla._XLAC._get_tensors_handle(list(tensors)))


def tensor_handle(tensor: Tensor) -> Any | None:
    """Return a handle of the data behind a tensor; None if a program has reused its memory."""
    try:
        [handle] = tensor_handles([tensor])
    except RuntimeError:
        return None
    return handle


def graph_hlo_text(outputs: Sequence[Tensor]) -> str:
    """Return the pending graph of ``outputs`` as HLO text, before partitioning.

    Public are only environment variables that dump graphs when they are executed.
    """
    return str(torch_xla._XLAC._get_xla_tensors_hlo(list(outputs)))


def graph_hlo_proto(outputs: Sequence[Tensor]) -> bytes:
    """Return the pending graph of ``outputs`` as a serialised HLO module, before partitioning."""
    return cast("bytes", torch_xla._XLAC._get_xla_tensors_hlo_proto(list(outputs)))


def pretend_device_count(count: int) -> None:
    """Make ``xr.global_runtime_device_count`` return ``count`` for the rest of the process.

    A process has at most 127 virtual CPU devices. A graph for more can be traced, though not
    executed: meshes use only this number. There is no public way to describe devices
    that do not exist.
    """
    vars(xr)["global_runtime_device_count"] = lambda: count


# ------------------------------------------------------------------------------- replay
#
# torch_xla offers a compiled program that runs without tracing only behind torch.compile, whose
# AOTAutograd cannot trace a whole step with its optimizer (``_dynamo/dynamo_bridge.py``).


CONSTANT_ID = -1
"""Identifier of program inputs that hold a constant which torch_xla caches by its value."""


def are_pending(tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether its value has been traced but not computed."""
    return list(torch_xla._XLAC._check_tensor_need_materialization(list(tensors)))


def seed_id() -> int:
    """Return the identifier of the input that holds the seed of the device's generator."""
    return int(torch_xla._XLAC._get_seed_info_id())


def program_inputs(outputs: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Return what the pending graph of ``outputs`` reads, in the order of its parameters.

    Returns:
        The identifier of each input, which is that of the tensor it was read from (``tensor_id``)
        or an unknown one for a constant, and tensors of their data.
    """
    ids, tensors = torch_xla._XLAC._get_tensors_xla_device_data_node(list(outputs))
    return list(ids), list(tensors)


def allow_donation(tensor: Tensor) -> None:
    """Let the next program compiled with this input reuse its memory for an output."""
    torch_xla._XLAC._set_buffer_donation(tensor, True)


def compile_program(outputs: Sequence[Tensor]) -> Any:
    """Compile the pending graph of ``outputs`` without running it; returns its key.

    A program that has been compiled before, with the same inputs donated, is not compiled again.
    """
    with alias_with_buffer_donor_config():
        key = torch_xla._XLAC._get_graph_hash(list(outputs))
        torch_xla._XLAC._xla_warm_up_cache(list(outputs), [])
    return key


def run_program(key: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Run a compiled program, without waiting for it; returns its outputs.

    The inputs that it may reuse must not be read afterwards.
    """
    return list(torch_xla._XLAC._run_cached_graph(key, list(inputs)))


def discard_pending(device: torch.device) -> None:
    """Forget everything that has been traced but not computed; those tensors lose their value."""
    torch_xla._XLAC._clear_pending_irs(str(device))


# ------------------------------------------------------------------------------- sharding


def sharding_spec(
    mesh: xs.Mesh, spec: tuple[Any, ...], axis_sizes: Mapping[str, int], *, minibatch: bool
) -> xs.ShardingSpec:
    """Return the sharding of a transfer from the host, with its replication groups.

    torch_xla 2.9.0 assumes that a spec without None names every axis of the mesh. The private
    fields are set for the specs that do not, whose tensors are replicated over the other axes.
    """
    sharding = xs.ShardingSpec(mesh, spec, minibatch=minibatch)
    named = [
        axis for entry in spec for axis in ([entry] if isinstance(entry, str) else entry or ())
    ]
    shards = math.prod(axis_sizes[axis] for axis in named)
    if None not in spec and shards < mesh.size():
        sharding._sharding_type = ShardingType.PARTIAL
        sharding._group_assignment, sharding._replication_groups = _get_group_assignment(
            ShardingType.PARTIAL, np.array(sharding._tile_assignment), len(spec), set()
        )
    return sharding


def sharding_text(tensor: Tensor) -> str:
    """Return the sharding of an XLA tensor in XLA's notation, such as ``{devices=[4,1]...}``.

    The public ``XLAShardedTensor.sharding_spec`` requires a wrapped tensor.
    """
    return str(torch_xla._XLAC._get_xla_sharding_spec(tensor))


def annotate_sharding(tensor: Tensor, op_sharding: Any) -> None:
    """Annotate a tensor in place with the result of ``xs.Mesh.get_op_sharding``.

    The public ``xs.annotate_custom_sharding`` wraps its result in an ``XLAShardedTensor``. A step
    makes a thousand annotations, on the host thread that keeps the devices busy.
    """
    torch_xla._XLAC._xla_annotate_custom_sharding(tensor, op_sharding)


def tensor_from_shards(shards: Sequence[Tensor], op_sharding: Any, shape: Sequence[int]) -> Tensor:
    """Return the global tensor whose shards are given, one for each device of this process.

    The public ``xm.send_cpu_data_to_device`` splits a tensor of the host itself, and fails where
    several devices hold the same rows of a mini-batch.
    """
    found = torch_xla._XLAC._global_tensor_from_cpu_shards(list(shards), op_sharding, list(shape))
    return cast("Tensor", found)


def to_local_shards(tensor: Tensor) -> Tensor:
    """Begin manual partitioning: return each device's shard of an annotated tensor.

    The public ``xs.enable_manual_sharding`` marks its argument in place, which changes a parameter
    for the rest of the run.
    """
    return cast("Tensor", torch_xla._XLAC._spmd_full_to_shard_shape(tensor))


def to_global_tensor(shard: Tensor, op_sharding: Any, shape: Sequence[int]) -> Tensor:
    """End manual partitioning: return the tensor of ``shape`` that the devices hold shards of.

    The public ``xs.disable_manual_sharding`` returns an ``XLAShardedTensor``, which custom
    operators cannot return.
    """
    manual = torch_xla._XLAC.OpSharding([], [], [], ShardingType.MANUAL)
    torch_xla._XLAC._mark_manual_sharding(shard, manual)
    found = torch_xla._XLAC._spmd_shard_to_full_shape(
        shard, op_sharding, torch.Size(shape), shard.dtype
    )
    return cast("Tensor", found)


def reduce_scatter_shards(shard: Tensor, groups: list[list[int]]) -> Tensor:
    """Sum shards over each group of devices and scatter the sum along the first dimension.

    For manually partitioned tensors. The public ``xm.reduce_scatter`` is for one process per
    device; there is no public collective for SPMD.
    """
    size = len(groups[0])
    found = torch_xla._XLAC._xla_spmd_reduce_scatter("sum", shard, 1.0, 0, size, groups)
    return cast("Tensor", found)


def all_reduce_shards(shard: Tensor, groups: list[list[int]]) -> Tensor:
    """Sum shards over each group of devices; see ``reduce_scatter_shards``."""
    return cast("Tensor", torch_xla._XLAC._xla_spmd_all_reduce("sum", shard, 1.0, groups))


@dataclass(frozen=True)
class DeviceShard:
    """The shard of a tensor that one device of this process holds.

    Attributes:
        data: a copy on the CPU, padded where the tensor does not divide evenly.
        device: name of the device.
        replica: 0 for the first device that holds this shard, counted over all processes.
        index: a slice for each dimension of the global tensor; None if the device holds all of it.
    """

    data: Tensor
    device: str
    replica: int
    index: tuple[slice, ...] | None


def device_shards(tensors: Sequence[Tensor]) -> list[list[DeviceShard]]:
    """Copy the shards of this process's devices to the CPU; the devices must be idle.

    The public ``XLAShardedTensor.local_shards`` copies one tensor at a time and requires wrapped
    tensors.
    """
    unwrapped = list(tensors)
    data = torch_xla._XLAC._get_local_shards(unwrapped)
    places = torch_xla._XLAC._get_local_shard_replica_and_indices(unwrapped)
    return [
        [
            DeviceShard(shard, device, replica, None if index is Ellipsis else tuple(index))
            for (shard, device), (replica, index) in zip(of_data, of_places, strict=True)
        ]
        for of_data, of_places in zip(data, places, strict=True)
    ]


# ------------------------------------------------------------------------------- custom kernels


def call_computation(name: str, tensors: Sequence[Tensor], computation: Any) -> list[Tensor]:
    """Insert an XLA computation into the graph and return its results.

    The public ``xb.call_jax`` takes a jax function, which it lowers for the devices of the process;
    ``rae-xla plan`` needs a computation for a TPU that is not present.
    """
    return list(torch_xla._XLAC._xla_user_computation(name, tensors, computation))


# ------------------------------------------------------------------------------- scan


def leave_scan_shardings_to_caller() -> None:
    """Keep ``torch_xla.experimental.scan`` from sharding the gradients of its inputs.

    It would shard each gradient like its input with a jax function, which needs torchax and flax.
    The XLA backend annotates gradients where the weights are used. The function is a module global
    of ``scan`` and there is no option to disable it.
    """
    torch_xla.experimental.scan.shard_as = lambda a, b: (a, b)


def minimal_activation_memory() -> AbstractContextManager[Any]:
    """Make ``min_cut_rematerialization_partition`` save nothing but the inputs of a function.

    ``torch._functorch.config.activation_memory_budget`` is documented by the PyTorch blog on
    activation checkpointing, but the module is private.
    """
    return cast("AbstractContextManager[Any]", functorch_config.patch(activation_memory_budget=0.0))


def call_with_parameters(
    module: nn.Module,
    forward: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Any],
) -> Any:
    """Call ``forward``, a method of ``module``, with other tensors in place of its parameters.

    The public ``torch.func.functional_call`` calls the module itself: its hooks would run twice,
    and a replaced ``forward`` would call itself.
    """
    with _reparametrize_module(module, dict(parameters)):
        return forward(*inputs)


def detach_results(nested: Any) -> Any:
    """Return nested results without their autograd graphs, which hold tensors of the forward pass.

    Tensors without a graph stay the same objects.
    """
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t if t.grad_fn is None else t.detach(), nested
    )


def flatten(nested: Any) -> tuple[list[Any], Any]:
    """Flatten dicts, lists and tuples to their leaves; returns the leaves and their structure.

    Structures can be compared, and ``unflatten`` of a structure nests leaves again. torch has no
    public pytree API for Python containers in 2.9.
    """
    leaves, structure = pytree.tree_flatten(nested)
    return leaves, structure
