"""Compiled XLA programs kept on the disk, so that a restart need not compile again."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from rae_xla.errors import UserError


def open_cache(folder: str, worker: int) -> None:
    """Keep compiled programs in ``folder/host-<worker>``: hosts may share the disk, and several
    that write one file at a time would spoil it. Call it before anything is compiled.

    Raises:
        UserError: nothing can be written there.
    """
    own = Path(folder).expanduser() / f"host-{worker}"
    probe = own / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        own.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"runtime.compile_cache: {own} cannot be written ({error.strerror}); name a folder on "
            "a disk of each host, or leave it out"
        ) from error
    import torch_xla.runtime as xr

    xr.initialize_cache(os.fspath(own), readonly=False)


def cache_warnings() -> list[str]:
    """That programs were found on the disk and could not be loaded, if so."""
    import torch_xla.debug.metrics as met

    failed = met.counter_value("PersistentCacheDeserializeFailure")
    if not failed:
        return []
    return [
        f"runtime.compile_cache: {failed} compiled programs were found, but this torch_xla cannot "
        "load what it has written (pytorch/xla issue 9094); they were compiled again"
    ]
