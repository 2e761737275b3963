"""The plain torch backend: one CPU or CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae_xla.errors import UserError
from rae_xla.runtime.chips import Chip, Memory, known_chip
from rae_xla.runtime.interface import Batch, Fn
from rae_xla.runtime.mesh import MeshShape, resolve_mesh
from rae_xla.runtime.remat import evenly_spread
from rae_xla.runtime.sharding import Shardings, load_rules, resolve_shardings
from rae_xla.runtime.snapshot import HostTensor
from rae_xla.runtime.whole import WholeBatch

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig


class TorchRuntime(WholeBatch):
    """See ``Runtime``. Everything runs eagerly unless ``compile_graphs`` asks for torch.compile."""

    backend = "torch"
    process_index = 0
    process_count = 1

    def __init__(
        self,
        *,
        mesh: MeshConfig,
        precision: str,
        compile_graphs: bool,
        seed: int,
        remat: float = 0.0,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mesh: MeshShape = self._resolve(mesh)
        self._precision = precision
        if precision == "fp32":  # cuDNN's default for convolutions is TF32, of 10 bits
            torch.backends.cudnn.allow_tf32 = False
        self._compile = compile_graphs
        self._remat = remat
        self._rules = load_rules(mesh.sharding) if remat or self.process_count > 1 else {}
        self.description = self._describe(
            torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        )
        self._second_stream: torch.cuda.Stream | None = None
        torch.manual_seed(seed)

    @property
    def on_cpu(self) -> bool:
        """Without CUDA."""
        return self.device.type == "cpu"

    def _resolve(self, mesh: MeshConfig) -> MeshShape:
        try:
            return resolve_mesh(mesh, devices=1)
        except UserError as error:
            raise UserError(f"{error}{_how_to_use(torch.cuda.device_count())}") from error

    def _describe(self, name: str) -> str:
        return f"1 torch device ({name}), {self._precision}" + _how_to_use(
            torch.cuda.device_count()
        )

    def place(self, module: nn.Module) -> nn.Module:
        """Move the module to the device."""
        if self._remat:
            self._rematerialise(module, self._shardings(module))
        return module.to(self.device)

    def _shardings(self, module: nn.Module) -> Shardings:
        return resolve_shardings(module, self._rules, self.mesh.axis_sizes)

    def _rematerialise(self, module: nn.Module, shardings: Shardings) -> None:
        """Do it to the stacks of blocks that are trained, once."""
        blocks = [module.get_submodule(name) for name in shardings.blocks]
        if any("forward" in vars(block) for block in blocks):
            return
        trained = [b for b in blocks if any(p.requires_grad for p in b.parameters())]
        for block in evenly_spread(trained, self._remat):
            # Blocks draw no random numbers whose state would have to be kept.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )

    def place_tensors(self, tensors: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Move the tensors to the device."""
        return {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}

    def put(self, batch: Mapping[str, Tensor]) -> Batch:
        """Move a batch to the device; from pinned memory the copy overlaps what runs there."""
        if self.device.type == "cpu":
            return dict(batch)
        return {k: v.pin_memory().to(self.device, non_blocking=True) for k, v in batch.items()}

    def compile(self, fn: Fn) -> Fn:
        """torch.compile where the configuration asks for it."""
        return torch.compile(fn) if self._compile else fn  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        if self._precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def fetch(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the CPU."""
        return [result.cpu() for result in results]

    def fetch_later(self, result: Tensor) -> Callable[[], Tensor]:
        """Copy it behind what computes it; an ordinary copy would wait for all of the stream."""
        if self.device.type != "cuda":
            return result.cpu
        copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        copy.copy_(result, non_blocking=True)
        there = torch.cuda.Event()
        there.record()

        def wait() -> Tensor:
            there.synchronize()
            return copy

        return wait

    def own_rows(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """All there are here."""
        copies = {name: self.fetch_later(tensor) for name, tensor in tensors.items()}
        return lambda: {name: copy() for name, copy in copies.items()}

    @contextmanager
    def beside(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """In a CUDA stream of its own."""
        if self.device.type != "cuda":
            yield
            return
        if self._second_stream is None:
            self._second_stream = torch.cuda.Stream()
        self._second_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._second_stream):
            for tensor in inputs:  # their memory is not for others before this stream is done
                tensor.record_stream(self._second_stream)
            yield

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

    def snapshot(self, tensors: Mapping[str, Tensor]) -> dict[str, HostTensor]:
        """Whole copies on the CPU."""
        return {name: HostTensor.whole(tensor) for name, tensor in self.to_host(tensors).items()}

    def saving_group(self) -> None:
        """This process is alone."""

    def synchronize(self) -> None:
        """Wait for the CUDA stream."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def exchange(self, text: str) -> list[str]:
        """This process is alone."""
        return [text]

    def compilations(self) -> int:
        """Graphs made by torch.compile."""
        if not self._compile:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def fallbacks(self) -> dict[str, int]:
        """None: every operation runs where its tensors are."""
        return {}

    def chip(self) -> Chip | None:
        """By the name of the GPU."""
        return known_chip(torch.cuda.get_device_name()) if self.device.type == "cuda" else None

    def memory(self) -> Memory | None:
        """What torch's allocator counts: tensors, not what it holds in reserve."""
        if self.device.type != "cuda":
            return None
        total = torch.cuda.get_device_properties(self.device).total_memory
        used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return Memory(used, peak, total)

    @contextmanager
    def profile(self, folder: Path) -> Iterator[None]:
        """By torch's profiler."""
        from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        written = tensorboard_trace_handler(str(folder), f"process-{self.process_index}")
        with profile(activities=activities, on_trace_ready=written):
            yield
            self.synchronize()

    def warnings(self) -> list[str]:
        """None."""
        return []


def _how_to_use(gpus: int) -> str:
    """What to say where there are more GPUs than the one a process uses."""
    if gpus < 2:
        return ""
    return (
        f" (this machine has {gpus} GPUs: `torchrun --nproc-per-node {gpus} -m rae_xla ...` uses "
        "all of them)"
    )
