"""What a checkpoint holds of a run, and the way back: gathered from a state, restored into one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rae_xla.data import storage
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import (
    CHECKPOINTS,
    FORMAT,
    TIES,
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    read_manifest,
    verify,
)
from rae_xla.interop.checkpoint_tensors import PartTensors, read_parts, stored_parts
from rae_xla.models.weights import check_fits
from rae_xla.runtime import Runtime
from rae_xla.train.same_run import code_version
from rae_xla.train.stage import Stage
from rae_xla.train.state import MOMENTS, TrainState, make_state

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def checkpoints_folder(config: RunConfig, results: Path) -> str:
    """Where a run has its checkpoints."""
    return config.checkpoint.dir or str(results / CHECKPOINTS)


def state_tensors(stage: Stage, state: TrainState) -> dict[str, Tensor]:
    """All that a run goes on from, by ``<part>/<name>``, on the devices; weights in the published
    layout.
    """
    parts: dict[str, Mapping[str, Tensor]] = {
        "model": stage.publish(state.model.module.state_dict()),
        "ema": stage.publish(state.ema.state_dict()),
        "optimizer": state.model.optimizer_tensors(),
    }
    if state.disc is not None:
        parts["disc"] = state.disc.module.state_dict()
        parts["disc_optimizer"] = state.disc.optimizer_tensors()
    return {f"{part}/{name}": t for part, of in parts.items() for name, t in of.items()}


def run_facts(
    config: RunConfig, runtime: Runtime, stage: Stage, step: int, data: str
) -> dict[str, Any]:
    """What the manifest says of the run; ``data`` is the fingerprint of its training data.

    The order of the data and all random numbers are functions of the seed and the step, so these
    two are the whole position of the run.
    """
    rates = {name: value.item() for name, value in stage.inputs(step).items()}
    return {
        "format": FORMAT,
        "step": step,
        "seed": config.training.global_seed,
        "data": {"position": step, "fingerprint": data},
        "scheduler": {"next_step": rates},
        TIES: stage.ties.to_dict(),
        "code": code_version(),
        "written_by": {
            "backend": runtime.backend,
            "mesh": str(runtime.mesh),
            "processes": runtime.process_count,
        },
        "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_dict(),
    }


def choose_checkpoint(
    folder: str, runtime: Runtime, before: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is whole; each process checks a part of it, all agree.

    Args:
        folder: of checkpoints.
        runtime: whose processes all call this.
        before: look only at checkpoints of earlier steps than this.

    Returns:
        None where no checkpoint was committed.

    Raises:
        UserError: on every process, when all of them are broken or they cannot be reached.
    """
    speaks = runtime.process_index == 0
    steps = [s for s in _listed_steps(folder, runtime) if before is None or s < before]
    broken: list[str] = []
    for step in reversed(steps):
        checkpoint = Checkpoint(checkpoint_path(folder, step))
        said = [json.loads(text) for text in runtime.exchange(_check_share(checkpoint, runtime))]
        for fault in (s for s in said if s["unreachable"]):
            raise UserError(fault["unreachable"])
        faults = [s["broken"] for s in said if s["broken"]]
        if not faults:
            if broken and speaks:
                print(f"warning: going back to {checkpoint}", file=sys.stderr)
            return checkpoint
        broken.append(faults[0])
        if speaks:
            print(f"warning: {faults[0]}", file=sys.stderr)
    if broken:
        raise UserError(
            f"none of the {len(broken)} checkpoints in {folder} is whole; the newest: {broken[0]}. "
            "Nothing was deleted; give another --results-dir to begin anew"
        )
    return None


def _listed_steps(folder: str, runtime: Runtime) -> list[int]:
    """As process 0 sees them, for all."""
    own: dict[str, Any] = {"steps": [], "error": ""}
    if runtime.process_index == 0:
        try:
            own["steps"] = [checkpoint.step for checkpoint in list_checkpoints(folder)]
        except OSError as error:
            own["error"] = f"checkpoints in {folder} cannot be listed: {error}"
    first = json.loads(runtime.exchange(json.dumps(own))[0])
    if first["error"]:
        raise UserError(first["error"])
    return list(first["steps"])


def _check_share(checkpoint: Checkpoint, runtime: Runtime) -> str:
    """Check this process's share of a checkpoint's files; what is wrong, as text for the others."""
    fault = {"broken": "", "unreachable": ""}
    try:
        share = (runtime.process_index, runtime.process_count)
        verify(checkpoint, read_manifest(checkpoint), share=share)
        stored_parts(checkpoint)
    except BrokenCheckpointError as error:
        fault["broken"] = str(error)
    except (OSError, UserError) as error:
        fault["unreachable"] = str(error)
    return json.dumps(fault)


def restore(stage: Stage, runtime: Runtime, checkpoint: Checkpoint | None) -> TrainState:
    """The stage's state on the devices, from a checkpoint (checked already) if there is one.

    Names, shapes and types of everything are compared before anything is read.

    Raises:
        UserError: the checkpoint is of another model.
    """
    if checkpoint is None:
        return make_state(stage.model, runtime, disc=stage.disc)
    where = f"checkpoint {checkpoint}"
    manifest = read_manifest(checkpoint)
    wanted = ["model", "ema", "optimizer"]
    if stage.disc is not None:
        wanted += ["disc", "disc_optimizer"]
    stored = stored_parts(checkpoint)
    if missing := [part for part in wanted if part not in stored]:
        names = ", ".join(missing)
        raise UserError(f"{where} has no {names}, but this run trains it: it is of another run")
    _check_parts(stage, stored, where)
    saved: dict[str, Any] = dict(read_parts(checkpoint, wanted))
    saved |= {name: stage.unpublish(saved[name]) for name in ("model", "ema")}
    saved["step"] = manifest["step"]
    return make_state(stage.model, runtime, saved, where, stage.disc)


def _check_parts(stage: Stage, stored: PartTensors, where: str) -> None:
    for part in ("model", "ema"):
        _check_module(stage.model, stage.unpublish(stored[part]), f"{where} ({part})")
    _check_moments(stage.model, stored["optimizer"], f"{where} (optimizer)")
    if stage.disc is not None:
        _check_module(stage.disc, stored["disc"], f"{where} (disc)")
        _check_moments(stage.disc, stored["disc_optimizer"], f"{where} (disc_optimizer)")


def _check_module(module: nn.Module, stored: Mapping[str, Tensor], where: str) -> None:
    check_fits(module, stored, where)
    for name, own in module.state_dict().items():
        if stored[name].dtype != own.dtype:
            raise UserError(f"{where}: {name} is {stored[name].dtype}, expected {own.dtype}")


def _check_moments(module: nn.Module, stored: Mapping[str, Tensor], where: str) -> None:
    own = {
        f"{name}/{moment}": tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        for moment in MOMENTS
    }
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if own != found:
        differs = sorted(k for k in own.keys() | found.keys() if own.get(k) != found.get(k))
        raise UserError(
            f"{where} does not fit what this run trains: {differs[0]} is {found.get(differs[0])}, "
            f"expected {own.get(differs[0])} ({len(differs)} differ)"
        )


def check_shared(folder: str, runtime: Runtime) -> None:
    """Make sure that all processes see the same folder: a checkpoint needs every one's part.

    Raises:
        UserError: on every process, when one does not see what process 0 writes.
    """
    if runtime.process_count == 1 or storage.is_remote(folder):
        return
    probe = storage.join(folder, ".shared")
    if runtime.process_index == 0:
        storage.make_folder(folder)
        storage.write_bytes(probe, b"")
    runtime.exchange("written")
    seen = runtime.exchange("yes" if storage.exists(probe) else "no")
    if runtime.process_index == 0:
        storage.remove(probe)
    if "no" in seen:
        raise UserError(
            f"checkpoints in {folder}: process {seen.index('no')} does not see what process 0 "
            "writes there. Of several hosts each writes its part, so all must reach the folder: "
            "set checkpoint.dir=gs://BUCKET/RUN, or a folder on a shared disk"
        )
