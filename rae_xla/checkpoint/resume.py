"""Choose the checkpoint that a run resumes from, the same in all processes."""

from __future__ import annotations

import json
import logging
from typing import Any

from rae_xla import storage
from rae_xla.checkpoint.manager import (
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.tensors import stored_parts
from rae_xla.errors import UserError
from rae_xla.runtime import Backend

logger = logging.getLogger(__name__)


def choose_checkpoint(
    folder: str, backend: Backend, before: int | None = None
) -> Checkpoint | None:
    """Return the newest intact checkpoint; all processes call this and get the same answer.

    Every process verifies a share of the files. Broken checkpoints are logged and left as they are.

    Args:
        folder: of the run's checkpoints.
        backend: of the run.
        before: consider only checkpoints of earlier steps than this.

    Returns:
        None if there is no committed checkpoint.

    Raises:
        UserError: in every process, if all checkpoints are broken or cannot be reached.
    """
    steps = [s for s in _list_steps(folder, backend) if before is None or s < before]
    broken: list[str] = []
    for step in reversed(steps):
        checkpoint = Checkpoint(checkpoint_path(folder, step))
        faults = [
            json.loads(t) for t in backend.all_gather_text(_verify_share(checkpoint, backend))
        ]
        if unreachable := [fault["unreachable"] for fault in faults if fault["unreachable"]]:
            raise UserError(unreachable[0])
        if not (reasons := [fault["broken"] for fault in faults if fault["broken"]]):
            if broken:
                _warn(backend, f"using the older checkpoint {checkpoint}")
            return checkpoint
        broken.append(reasons[0])
        _warn(backend, reasons[0])
    if broken:
        raise UserError(
            f"none of the {len(broken)} checkpoints in {folder} is intact; the newest: "
            f"{broken[0]}. Nothing was deleted. To start a new run, give another --results-dir"
        )
    return None


def _warn(backend: Backend, message: str) -> None:
    if backend.process_index == 0:
        logger.warning(message)


def _list_steps(folder: str, backend: Backend) -> list[int]:
    """Return the steps of the checkpoints that process 0 lists, in every process."""
    own: dict[str, Any] = {"steps": [], "error": ""}
    if backend.process_index == 0:
        try:
            own["steps"] = [checkpoint.step for checkpoint in list_checkpoints(folder)]
        except OSError as error:
            own["error"] = (
                f"cannot list the checkpoints in {folder} ({error}): check the access to it"
            )
    first = json.loads(backend.all_gather_text(json.dumps(own))[0])
    if first["error"]:
        raise UserError(first["error"])
    return list(first["steps"])


def _verify_share(checkpoint: Checkpoint, backend: Backend) -> str:
    """Verify this process's share of the files; return what is wrong as JSON."""
    fault = {"broken": "", "unreachable": ""}
    try:
        share = (backend.process_index, backend.process_count)
        verify(checkpoint, read_checkpoint_manifest(checkpoint), share=share)
        stored_parts(checkpoint)
    except BrokenCheckpointError as error:
        fault["broken"] = str(error)
    except (OSError, UserError) as error:
        fault["unreachable"] = str(error)
    return json.dumps(fault)


def check_shared(folder: str, backend: Backend) -> None:
    """Check that all processes reach the folder of checkpoints; each writes a part of them.

    Raises:
        UserError: in every process, if one of them does not see a file that process 0 writes.
    """
    if backend.process_count == 1 or storage.is_remote(folder):
        return
    probe = storage.join(folder, ".shared")
    if backend.process_index == 0:
        storage.make_folder(folder)
        storage.write_bytes(probe, b"")
    backend.all_gather_text("written")
    seen = backend.all_gather_text("yes" if storage.exists(probe) else "no")
    if backend.process_index == 0:
        storage.remove(probe)
    if "no" in seen:
        raise UserError(
            f"checkpoints in {folder}: process {seen.index('no')} does not see the files that "
            "process 0 writes there. Every host writes its part of a checkpoint, so all must reach "
            "the folder: set checkpoint.dir=gs://BUCKET/RUN, or a folder on a shared disk"
        )
