"""Backends: where a run computes, behind one interface (``rae_xla.runtime.backend.Backend``)."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING, cast

from rae_xla.errors import UserError
from rae_xla.runtime.accelerators import torch_device, unused_accelerator
from rae_xla.runtime.backend import Backend, Batch
from rae_xla.runtime.process_group import read_launch

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig, RuntimeConfig

__all__ = ["Backend", "Batch", "start"]

logger = logging.getLogger(__name__)


def start(
    runtime: RuntimeConfig, mesh: MeshConfig, *, seed: int = 0, same_bits: bool = False
) -> Backend:
    """Start the backend of a run; once per process, before any tensor is created.

    ``auto`` prefers TPUs, then an accelerator of PyTorch, then XLA on the CPU if torch_xla is
    installed, then PyTorch on the CPU. Processes that torchrun started use PyTorch.

    Args:
        runtime: the ``runtime`` section of the configuration.
        mesh: the ``mesh`` section.
        seed: of torch's default generator.
        same_bits: on a CPU, make XLA's results independent of the number of devices, up to
            ``REPRODUCIBLE_THREADS`` of ``runtime.xla.backend`` or the number of cores; up to a
            tenth slower.

    Raises:
        UserError: the backend is not installed, or the mesh does not fit the devices.
    """
    started = _start(runtime, mesh, seed=seed, same_bits=same_bits)
    if started.on_cpu and (reason := unused_accelerator()):
        logger.warning(
            "this machine has NVIDIA GPUs, but the run computes on the CPU: %s. Install the "
            "PyTorch that fits the driver (`nvidia-smi` shows its CUDA version), or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU",
            reason,
        )
    return started


def _start(runtime: RuntimeConfig, mesh: MeshConfig, *, seed: int, same_bits: bool) -> Backend:
    backend = choose_backend() if runtime.backend == "auto" else runtime.backend
    if backend == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            raise UserError(
                "runtime.backend is xla but torch_xla is not installed: run install_spmd.sh, or "
                "set runtime.backend=torch"
            )
        xla = _import_xla_backend()
        return cast("Backend", xla.XLABackend(runtime, mesh, seed=seed, same_bits=same_bits))
    if runtime.attention == "flash":
        raise UserError(
            "runtime.attention is flash, but its kernels run only on TPUs, and the backend of this "
            "run is torch, whose own attention is fused: set runtime.attention=auto"
        )
    launch = read_launch()
    if launch.count == 1:
        from rae_xla.runtime.torch.backend import TorchBackend

        return TorchBackend(runtime, mesh, seed=seed)
    from rae_xla.runtime.torch.distributed_backend import DistributedTorchBackend

    return DistributedTorchBackend(launch, runtime, mesh, seed=seed)


def choose_backend() -> str:
    """Return ``xla`` or ``torch``, whichever suits the devices of this machine."""
    if importlib.util.find_spec("torch_xla") is None:
        return "torch"
    if _import_xla_backend().on_tpu():
        return "xla"
    started_by_torchrun = read_launch().count > 1
    has_accelerator = torch_device().type != "cpu"
    return "torch" if has_accelerator or started_by_torchrun else "xla"


def _import_xla_backend() -> ModuleType:
    """Import the XLA backend and silence messages of torch_xla that a user cannot act on.

    Those are a line about a future partitioner at every compilation, and the name of the device,
    which the run prints itself.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        return importlib.import_module("rae_xla.runtime.xla.backend")
    finally:
        root.setLevel(level)
