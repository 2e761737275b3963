"""Weights from files into modules, strictly: every key that does not fit is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rae_xla.errors import UserError

_SHOWN = 8


def read_weight_file(path: str | Path, what: str) -> Any:
    """Read a ``.safetensors`` or ``torch.save`` file onto the CPU; ``what`` names it in errors.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return read_torch_file(path, what)
    _must_exist(path, what)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: {path} cannot be read as safetensors ({error})") from error


def read_torch_file(path: str | Path, what: str) -> Any:
    """Read a ``torch.save`` file onto the CPU, tensors and plain containers only.

    Raises:
        UserError: if there is no such file, or it is not one that is safe to read.
    """
    path = Path(path).expanduser()
    _must_exist(path, what)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a pickle may raise anything
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{what}: {path} cannot be read as a torch file ({reason})") from error


def write_torch_file(content: Any, path: Path) -> None:
    """Write a ``torch.save`` file; what stands under its name is whole.

    Raises:
        UserError: if it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        unfinished.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else "no space left, or a limit on file sizes"
        raise UserError(f"{path} cannot be written: {reason}") from error


def _must_exist(path: Path, what: str) -> None:
    if path.is_dir():
        raise UserError(f"{what}: {path} is a folder; give a file")
    if not path.is_file():
        raise UserError(f"{what}: there is no file {path}")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``state`` into ``module``; keys and shapes must agree exactly.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape.
    """
    check_fits(module, state, where)
    module.load_state_dict(dict(state))


def check_fits(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Compare keys and shapes without loading; tensors on the meta device will do.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    faults = []
    if missing := [key for key in own if key not in state]:
        faults.append(f"missing {_listed(missing)}")
    if unexpected := [key for key in state if key not in own]:
        faults.append(f"unexpected {_listed(unexpected)}")
    if misshapen := [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]:
        faults.append(f"another shape: {_listed(misshapen)}")
    if faults:
        raise UserError(f"{where} does not fit {type(module).__name__}: {'; '.join(faults)}")


def is_meta(module: nn.Module) -> bool:
    """Whether the module was built on the meta device: shapes without values."""
    return next(module.parameters()).is_meta


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
