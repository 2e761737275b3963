"""Where it runs: one small interface, one file per backend."""

from __future__ import annotations

import importlib.util
import logging
import os
from types import ModuleType
from typing import Protocol, cast

import torch

from rae_xla.errors import UserError
from rae_xla.runtime.interface import Batch, Runtime

__all__ = ["Batch", "Runtime", "start"]


class _RuntimeSettings(Protocol):
    @property
    def backend(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def compile_cache(self) -> str | None: ...
    @property
    def devices(self) -> int | None: ...


class _MeshSettings(Protocol):
    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...


def start(settings: _RuntimeSettings, mesh: _MeshSettings, *, seed: int = 0) -> Runtime:
    """Start the backend a run asks for; once per process, before any tensor is made.

    ``auto`` takes TPU, then CUDA, then XLA on CPU where torch_xla is installed, then plain torch.

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
                data=mesh.data,
                fsdp=mesh.fsdp,
                precision=settings.precision,
                seed=seed,
                devices=settings.devices,
                compile_cache=settings.compile_cache,
            ),
        )
    from rae_xla.runtime.torch import TorchRuntime

    return TorchRuntime(
        data=mesh.data,
        fsdp=mesh.fsdp,
        precision=settings.precision,
        compile_graphs=settings.compile,
        seed=seed,
    )


def choose_backend() -> str:
    """``xla`` or ``torch``, from what the machine has."""
    if importlib.util.find_spec("torch_xla") is None:
        return "torch"
    if not _xla().on_tpu() and torch.cuda.is_available():
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
