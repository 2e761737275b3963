"""A results folder: `config.yaml`, `data.txt`, `metrics.jsonl`, `bad_samples.jsonl`,
`checkpoints/`, `samples/`.
"""

from __future__ import annotations

from pathlib import Path

from rae_xla.config import RunConfig, load_config
from rae_xla.errors import UserError
from rae_xla.train.checkpoint import list_checkpoints

CONFIG_FILE = "config.yaml"
DATA_FILE = "data.txt"


def bad_samples_file(process_index: int) -> str:
    """Where a process lists the samples it had to replace; hosts may share a results folder."""
    return "bad_samples.jsonl" if process_index == 0 else f"bad_samples.{process_index}.jsonl"


def claim_folder(folder: Path, config: RunConfig, data: str) -> None:
    """Make the folder this run's, or check that it is already.

    A run that has no checkpoint yet has nothing to lose, and another may take its folder.

    Args:
        folder: the results folder.
        config: of the run.
        data: the fingerprint of its training shards, wherever they lie.

    Raises:
        UserError: when it holds another run, when the run must not be resumed, or when it cannot
            be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results-dir {folder} is a file: give a folder")
    saved, known = folder / CONFIG_FILE, folder / DATA_FILE
    if list_checkpoints(folder):
        if saved.exists():
            _check_config(folder, config, load_config(str(saved)))
        if known.exists() and known.read_text(encoding="utf-8").strip() != data:
            raise UserError(
                f"{folder} holds a run on other training data than {config.data.train}: give "
                "another --results-dir, or the shards the run was started with"
            )
        if not config.checkpoint.resume:
            raise UserError(
                f"{folder} holds checkpoints of this run and checkpoint.resume is false: set it "
                "to true to go on, or give another --results-dir"
            )
    try:
        config.save(saved)
        known.write_text(data + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to the results folder {folder}: {error}") from error


def _check_config(folder: Path, config: RunConfig, theirs: RunConfig) -> None:
    changed = config.diff(theirs)
    if not changed:
        return
    new, old = config.flat(), theirs.flat()
    shown = "; ".join(f"{k}: {old.get(k)} -> {new.get(k)}" for k in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    raise UserError(
        f"{folder} holds a run of another configuration ({shown}{more}). Give another "
        "--results-dir, or the configuration the run was started with"
    )
