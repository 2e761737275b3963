"""Persistent cache of compiled XLA programs, so that a restart does not compile again."""

from __future__ import annotations

import os
import uuid
from importlib.metadata import version
from pathlib import Path

from rae_xla.errors import UserError


def can_load_programs() -> bool:
    """Return whether torch_xla can load the programs that it stores.

    torch_xla 2.9 cannot (pytorch/xla issue 9094): its cache would only cost time and disk space.
    """
    return not version("torch_xla").startswith("2.9.")


def open_cache(folder: str, host: str) -> None:
    """Store compiled programs in ``folder/host``; call it before anything is compiled.

    Every host has a folder, because hosts that share a disk would corrupt each other's files.

    Raises:
        UserError: the folder cannot be written.
    """
    own = Path(folder).expanduser() / host
    probe = own / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"runtime.compile_cache: {own} cannot be written ({error.strerror}); name a folder on "
            "a local disk, or remove the setting"
        ) from error
    import torch_xla.runtime as xr

    xr.initialize_cache(os.fspath(own), readonly=False)


def cache_warnings() -> list[str]:
    """Return a message if the cache that a run requested does not work, else nothing."""
    if not can_load_programs():
        return [
            f"runtime.compile_cache is ignored: torch_xla {version('torch_xla')} cannot load the "
            "programs that it stores (pytorch/xla issue 9094); every start compiles again"
        ]
    import torch_xla.debug.metrics as met

    failed = met.counter_value("PersistentCacheDeserializeFailure")
    if not failed:
        return []
    return [
        f"runtime.compile_cache: {failed} compiled programs were found, but this torch_xla "
        "cannot load the programs that it stores (pytorch/xla issue 9094); they were compiled again"
    ]
