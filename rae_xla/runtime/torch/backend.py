"""The torch backend on one device: a CPU, or any accelerator that PyTorch supports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae_xla.errors import UserError
from rae_xla.runtime.accelerators import (
    Accelerator,
    Memory,
    known_accelerator,
    torch_device,
    torch_device_name,
)
from rae_xla.runtime.backend import Batch, Fn, GlobalArithmetic
from rae_xla.runtime.blocks import evenly_spread
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.runtime.sharding import Shardings, load_rules, resolve_shardings
from rae_xla.runtime.snapshot import HostTensor

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RuntimeConfig


class TorchBackend(GlobalArithmetic):
    """The ``Backend`` of one process and one device; eager unless ``runtime.compile`` is set.

    Args:
        runtime: the ``runtime`` section of the configuration.
        mesh: the ``mesh`` section.
        seed: of torch's default generator.
        device: default: the first device of the accelerator, or the CPU.
    """

    name = "torch"
    process_index = 0
    process_count = 1

    def __init__(
        self,
        runtime: RuntimeConfig,
        mesh: MeshConfig,
        *,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.device = torch_device() if device is None else device
        self.mesh: MeshShape = self._resolve(mesh)
        self._precision = runtime.precision
        if runtime.precision == "fp32":
            _disable_tf32()
        self._compile = runtime.compile
        self._remat = runtime.remat
        self._rules = load_rules(mesh.sharding) if self._remat or self.process_count > 1 else {}
        self.description = self._describe(torch_device_name(self.device))
        self._second_stream: torch.Stream | None = None
        torch.manual_seed(seed)

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.type == "cpu"

    def _resolve(self, mesh: MeshConfig) -> MeshShape:
        try:
            return resolve_mesh(mesh, devices=1)
        except UserError as error:
            raise UserError(f"{error}{_torchrun_hint()}") from error

    def _describe(self, name: str) -> str:
        return f"1 torch device ({name}), {self._precision}{_torchrun_hint()}"

    def place(self, module: nn.Module) -> nn.Module:
        """Move the module to the device."""
        if self._remat:
            checkpoint_activations(self._blocks_to_rematerialise(module, self._shardings(module)))
        return module.to(self.device)

    def _shardings(self, module: nn.Module) -> Shardings:
        return resolve_shardings(module, self._rules, self.mesh.axis_sizes)

    def _blocks_to_rematerialise(self, module: nn.Module, shardings: Shardings) -> list[nn.Module]:
        """Return the blocks whose activations are recomputed; none if the module is placed."""
        blocks = [module.get_submodule(name) for name in shardings.blocks]
        if any("forward" in vars(block) for block in blocks):
            return []
        trained = [b for b in blocks if any(p.requires_grad for p in b.parameters())]
        return evenly_spread(trained, self._remat)

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Copy the tensors to the device."""
        return {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}

    def shard_batch(self, batch: Mapping[str, Tensor]) -> Batch:
        """Move a batch to the device; from pinned memory, so that the copy overlaps other work."""
        if self.on_cpu:
            return dict(batch)
        return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}

    def compile(self, fn: Fn) -> Fn:
        """Apply ``torch.compile`` if ``runtime.compile`` is set."""
        return torch.compile(fn) if self._compile else fn  # type: ignore[return-value]

    @contextmanager
    def full_float32(self) -> Iterator[None]:
        """Disable TF32, which has 10 bits, inside the context; see ``Backend``."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        allowed = matmul.allow_tf32, cudnn.allow_tf32
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = allowed

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a bf16 autocast context, or one that does nothing for fp32."""
        if self._precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def global_norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm over all elements, 0-d, with few kernel launches."""
        return foreach_norm(tensors)

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copy results to the CPU, all at the same time."""
        copies = [self.fetch_later(result) for result in results]
        return [copy() for copy in copies]

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Copy a result right after its computation; ``cpu()`` would wait for the whole stream."""
        if self.on_cpu:
            return result.cpu
        copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        copy.copy_(result, non_blocking=True)
        copied = torch.Event(self.device)
        copied.record(torch.accelerator.current_stream(self.device))

        def wait() -> Tensor:
            copied.synchronize()
            return copy

        return wait

    def local_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Copy all rows of this process."""
        copies = {name: self.fetch_later(tensor) for name, tensor in tensors.items()}
        return lambda: {name: copy() for name, copy in copies.items()}

    @contextmanager
    def side_stream(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Make a second stream of the accelerator current."""
        if self.on_cpu:
            yield
            return
        if self._second_stream is None:
            self._second_stream = torch.Stream(self.device)
        self._second_stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._second_stream:
            for tensor in inputs:  # their memory must not be reused before this stream is done
                tensor.record_stream(self._second_stream)
            yield

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def to_host_later(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Copy tensors right after their computation; ``to_host`` waits for the whole stream."""
        return self.local_rows({name: tensor.detach() for name, tensor in tensors.items()})

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Copy full tensors to the CPU."""
        return {name: HostTensor.full(tensor) for name, tensor in self.to_host(tensors).items()}

    def checkpoint_group(self) -> Any | None:
        """Return None: there is a single process."""
        return None

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of the single process."""
        return [text]

    def captures(self) -> int:
        """Return 0: nothing is replayed."""
        return 0

    def compilations(self) -> int:
        """Return how many graphs ``torch.compile`` has compiled."""
        if not self._compile:
            return 0
        from rae_xla.runtime.torch.compat import compiled_graphs  # imports the compiler

        return compiled_graphs()

    def fallbacks(self) -> dict[str, int]:
        """Return nothing: PyTorch raises where a device does not support an operation."""
        return {}

    def accelerator(self) -> Accelerator | None:
        """Return the kind of the device, from the driver's name for it."""
        return None if self.on_cpu else known_accelerator(torch_device_name(self.device))

    def memory(self) -> Memory | None:
        """Return what torch's allocator counts: the size of tensors, not of reserved memory."""
        if self.on_cpu:
            return None
        used = torch.accelerator.memory_allocated(self.device)
        peak = torch.accelerator.max_memory_allocated(self.device)
        # The total is a property of the device, for which there is no generic function.
        properties = getattr(torch.get_device_module(self.device), "get_device_properties", None)
        total = properties and getattr(properties(self.device), "total_memory", None)
        return Memory(used, peak, total)

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """Record a profile with torch's profiler, which includes the accelerator."""
        from torch.profiler import (
            ProfilerActivity,
            profile,
            supported_activities,
            tensorboard_trace_handler,
        )

        activities = {ProfilerActivity.CPU} if self.on_cpu else supported_activities()
        write = tensorboard_trace_handler(str(folder), f"process-{self.process_index}")
        with profile(activities=activities, on_trace_ready=write):
            yield
            self.synchronize()

    def warnings(self) -> list[str]:
        """Return nothing."""
        return []


def _disable_tf32() -> None:
    """Compute in float32 rather than TF32, of 10 bits.

    TF32 is PyTorch's default for convolutions, and for products where the environment asks for it
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, in NVIDIA's containers).
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def foreach_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all elements of tensors of one device, of which there are some."""
    # By default PyTorch launches one kernel for each tensor on a CPU, which is as fast there; but
    # operations that are counted on a CPU should be those of an accelerator.
    foreach = True if tensors[0].device.type in ("cpu", "cuda") else None
    return torch.nn.utils.get_total_norm(tensors, foreach=foreach)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Make blocks recompute their activations in the backward pass."""
    for block in blocks:
        # Blocks use no random generator whose state would have to be restored.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def _torchrun_hint() -> str:
    """How to use all devices of a machine; empty where there is at most one."""
    count = torch.accelerator.device_count()
    if count < 2:
        return ""
    return (
        f" (this machine has {count} accelerators: `torchrun --nproc-per-node {count} -m rae_xla "
        "...` uses all of them)"
    )
