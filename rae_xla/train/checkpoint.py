"""Checkpoints on local disk: whole or absent, never half.

A checkpoint is one file, ``checkpoints/step-00001000.pt``, in the layout the reference publishes (a
dict with ``model``, ``ema``, ``optimizer``, ``step``), so it can be named as ``stage_2.ckpt`` as it
is. It is written under a temporary name, flushed to the disk and renamed: a run killed at any
instant leaves the checkpoints before it untouched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rae_xla.errors import UserError

_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a results folder."""
    return folder / "checkpoints" / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of a results folder, oldest first."""
    found = (folder / "checkpoints").glob("step-*.pt")
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def newest_checkpoint(path: Path) -> Path:
    """A checkpoint file itself, or the newest one of a results folder.

    Raises:
        UserError: when there is none.
    """
    if not path.is_dir():
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint (checkpoints/step-*.pt)")
    return found[-1]


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], keep_last: int) -> Path:
    """Write a checkpoint and drop all but the newest ``keep_last``.

    Raises:
        OSError: when the disk is full or not writable; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".pt.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    for old in list_checkpoints(folder)[:-keep_last] if keep_last > 0 else []:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: when the file is missing, damaged or no training checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: it is damaged or not a "
            "torch file); delete it to go on from the one before it"
        ) from error
    missing = {"model", "ema", "optimizer", "step"} - set(content)
    if missing:
        raise UserError(f"{path} is no training checkpoint: it has no {', '.join(sorted(missing))}")
    return dict(content)
