"""A results folder: `config.yaml`, `data.txt`, `metrics.jsonl`, `environment.jsonl`,
`bad_samples.jsonl`, `classes.json`, `samples/`, and `checkpoints/` unless `checkpoint.dir` is
elsewhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae_xla.config import RunConfig, load_config
from rae_xla.data.class_names import record_class_names
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import (
    BrokenCheckpointError,
    Checkpoint,
    list_checkpoints,
    read_manifest,
)
from rae_xla.train.checkpoint import checkpoints_folder

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.txt"


def bad_samples_file(process_index: int) -> str:
    """Where a process lists the samples it had to replace; hosts may share a results folder."""
    return "bad_samples.jsonl" if process_index == 0 else f"bad_samples.{process_index}.jsonl"


def claim_folder(
    folder: Path, config: RunConfig, data: str, class_names: Sequence[str] = ()
) -> None:
    """Make the folder this run's, or check that it is already.

    A run that has no checkpoint yet has nothing to lose, and another may take its folder. What the
    checkpoints are of stands in themselves: the results folder may be lost, or another machine's.

    Args:
        folder: the results folder.
        config: of the run.
        data: the fingerprint of its training shards, wherever they lie.
        class_names: theirs, by label; kept for those who draw from the run.

    Raises:
        UserError: when it holds another run, when the run must not be resumed, or when it cannot
            be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file: give a folder")
    saved, known = folder / CONFIG_FILE, folder / DATA_FILE
    place = checkpoints_folder(config, folder)
    if checkpoints := list_checkpoints(place):
        manifest = _newest_manifest(checkpoints)
        if manifest is not None:
            _check_config(place, config, _config_of(manifest))
            if manifest["data"]["fingerprint"] != data:
                raise UserError(
                    f"{place} holds checkpoints of a run on other training data than "
                    f"{config.data.train}: give {_another(config)}, or the shards the run was "
                    "started with"
                )
        if not config.checkpoint.resume:
            raise UserError(
                f"{place} holds checkpoints of this run and checkpoint.resume is false: set it "
                f"to true to go on, or give {_another(config)}"
            )
    elif old := sorted((folder / "checkpoints").glob("step-????????.pt")):
        raise UserError(
            f"{folder} holds checkpoints of an older version, from which no training goes on "
            f"(their weights can be used: stage_1.ckpt or stage_2.ckpt={old[-1]}): give another "
            "--results-dir"
        )
    try:
        config.save(saved)
        known.write_text(data + "\n", encoding="utf-8")
        record_class_names(folder, class_names)
    except OSError as error:
        raise UserError(f"cannot write to the results folder {folder}: {error}") from error


def _newest_manifest(checkpoints: list[Checkpoint]) -> dict[str, Any] | None:
    """Of the newest checkpoint that has a readable one; which is whole is found out later."""
    for checkpoint in reversed(checkpoints):
        try:
            return read_manifest(checkpoint)
        except BrokenCheckpointError:
            continue
    return None


def _config_of(manifest: dict[str, Any]) -> RunConfig:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(manifest["config"], file)  # JSON is YAML
        file.flush()
        return load_config(file.name)


def _another(config: RunConfig) -> str:
    """What to change to begin anew."""
    return "another checkpoint.dir" if config.checkpoint.dir else "another --results-dir"


def _check_config(place: str, config: RunConfig, theirs: RunConfig) -> None:
    changed = config.diff(theirs)
    if not changed:
        return
    new, old = config.flat(), theirs.flat()
    shown = "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    raise UserError(
        f"{place} holds checkpoints of a run of another configuration ({shown}{more}). Give "
        f"{_another(config)}, or the configuration the run was started with"
    )
