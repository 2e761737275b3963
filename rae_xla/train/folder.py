"""A results folder: `config.yaml`, `data.txt`, `metrics.jsonl`, `checkpoints/`, `samples/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rae_xla.errors import UserError
from rae_xla.train.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

CONFIG_FILE = "config.yaml"


DATA_FILE = "data.txt"


def claim_folder(folder: Path, config: RunConfig, data: str) -> None:
    """Make the folder this run's, or check that it is already.

    Args:
        folder: the results folder.
        config: of the run.
        data: the fingerprint of its training shards, wherever they lie.

    Raises:
        UserError: when it holds another run, when the run must not be resumed, or when it cannot
            be written.
    """
    from rae_xla.config import load_config

    saved = folder / CONFIG_FILE
    if saved.exists():
        theirs = load_config(str(saved))
        changed = config.diff(theirs)
        if changed:
            mine, old = config.flat(), theirs.flat()
            shown = "; ".join(f"{k}: {old.get(k)} -> {mine.get(k)}" for k in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UserError(
                f"{folder} holds a run of another configuration ({shown}{more}). Give another "
                "--results-dir, or the configuration the run was started with"
            )
        if list_checkpoints(folder) and not config.checkpoint.resume:
            raise UserError(
                f"{folder} holds checkpoints of this run and checkpoint.resume is false: set it "
                "to true to go on, or give another --results-dir"
            )
    known = folder / DATA_FILE
    if known.exists() and known.read_text(encoding="utf-8").strip() != data:
        raise UserError(
            f"{folder} holds a run on other training data than {config.data.train}: give another "
            "--results-dir, or the shards the run was started with"
        )
    try:
        config.save(saved)
        known.write_text(data + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to the results folder {folder}: {error}") from error
