"""Where it runs: one small interface, one file per backend."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

import torch

from rae_xla.errors import UserError
from rae_xla.runtime.interface import Batch, Runtime
from rae_xla.runtime.launch import read_launch

if TYPE_CHECKING:
    from rae_xla.config import MeshConfig

__all__ = ["Batch", "Runtime", "start"]


class _RuntimeSettings(Protocol):
    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def remat(self) -> float: ...
    @property
    def scan(self) -> bool: ...
    @property
    def attention(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def compile_cache(self) -> str | None: ...
    @property
    def devices(self) -> int | None: ...


def start(
    settings: _RuntimeSettings, mesh: MeshConfig, *, seed: int = 0, same_bits: bool = False
) -> Runtime:
    """Start the backend a run asks for; once per process, before any tensor is made.

    ``auto`` takes TPU, then CUDA, then XLA on CPU where torch_xla is installed, then plain torch;
    several processes that torchrun started on CPUs are plain torch's.

    Args:
        settings: the ``runtime`` section.
        mesh: the ``mesh`` section.
        seed: of torch's own generator.
        same_bits: on a CPU, XLA rounds alike on any number of devices up to ``xla.LEAST_THREADS``
            or the cores; it may be slower by a tenth.

    Raises:
        UserError: when the backend is not installed or the mesh does not fit the devices.
    """
    backend = choose_backend() if settings.backend == "auto" else settings.backend
    if backend == "xla":
        if importlib.util.find_spec("torch_xla") is None:
            raise UserError(
                "runtime.backend is xla but torch_xla is not installed: run install_spmd.sh, or "
                "set runtime.backend=torch"
            )
        return cast(
            "Runtime",
            _xla().XLARuntime(
                mesh=mesh,
                precision=settings.precision,
                remat=settings.remat,
                scan=settings.scan,
                attention=settings.attention,
                seed=seed,
                devices=settings.devices,
                compile_cache=settings.compile_cache,
                same_bits=same_bits,
            ),
        )
    if settings.attention == "flash":
        raise UserError(
            "runtime.attention is flash, but its kernels run on TPUs alone, and this run's backend "
            "is torch, whose own attention is fused: set runtime.attention=auto"
        )
    launch = read_launch()
    if launch.count == 1:
        from rae_xla.runtime.torch import TorchRuntime

        return TorchRuntime(
            mesh=mesh,
            precision=settings.precision,
            remat=settings.remat,
            compile_graphs=settings.compile,
            seed=seed,
        )
    from rae_xla.runtime.torch_processes import TorchProcesses

    return TorchProcesses(
        launch,
        mesh=mesh,
        precision=settings.precision,
        remat=settings.remat,
        compile_graphs=settings.compile,
        seed=seed,
    )


def choose_backend() -> str:
    """``xla`` or ``torch``, from what the machine has."""
    if importlib.util.find_spec("torch_xla") is None:
        return "torch"
    several = read_launch().count > 1  # by torchrun, which starts no XLA runs
    if not _xla().on_tpu() and (torch.cuda.is_available() or several):
        return "torch"
    return "xla"


def _xla() -> ModuleType:
    """Import the XLA backend without what it prints: a line per compilation about a partitioner to
    come, and which device it takes, which the run says itself. Nothing a user could act on.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        return importlib.import_module("rae_xla.runtime.xla")
    finally:
        root.setLevel(level)
