"""Weights from files into modules, strictly: every key that does not fit is named."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rae_xla.errors import UserError

_SHOWN = 10


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
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{what}: {path} holds more than tensors and plain containers: reading it would "
                f"run code ({code[1]}), so it was not read. Have its author save a state dict alone"
            ) from None
        # torch's own text advises to turn the protection off
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it is no pickle of tensors" if unsafe else str(error).strip().split("\n")[0]
        raise UserError(f"{what}: {path} cannot be read as a torch file ({reason})") from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; what stands under its name is whole.

    Raises:
        UserError: if it cannot be written; nothing is left behind.
    """
    # Copies: safetensors refuses tensors that share memory.
    separate = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    _write(
        path,
        lambda unfinished: save_file(separate, unfinished, {"format": "pt", **(metadata or {})}),
    )


def write_torch_file(content: Any, path: Path) -> None:
    """Write a ``torch.save`` file; what stands under its name is whole.

    Raises:
        UserError: if it cannot be written; nothing is left behind.
    """
    _write(path, lambda unfinished: torch.save(content, unfinished))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch reports a full disk as Runtime
        unfinished.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else "no space left, or a limit on file sizes"
        raise UserError(f"{path} cannot be written: {reason}") from error


_MADE_BY = {
    "normalization_stat_path": "; `rae-xla stats` writes one (stage_1.params)",
    "pretrained_decoder_path": "; `rae-xla export decoder` writes one (stage_1.params)",
}


def _must_exist(path: Path, what: str) -> None:
    if path.is_dir():
        raise UserError(f"{what}: {path} is a folder; give a file")
    if not path.is_file():
        raise UserError(f"{what}: there is no file {path}{_MADE_BY.get(what, '')}")


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], where: str, *, assign: bool = False
) -> None:
    """Load ``state`` into ``module``; keys and shapes must agree exactly.

    With ``assign`` the module takes the tensors themselves, as one on the meta device must.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape.
    """
    check_fits(module, state, where)
    module.load_state_dict(dict(state), assign=assign)


def check_fits(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Compare keys and shapes without loading; tensors on the meta device will do.

    Raises:
        UserError: naming the keys that are missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    faults = []
    if missing := [key for key in own if key not in state]:
        faults.append(f"missing {listed(missing)}")
    if unexpected := [key for key in state if key not in own]:
        faults.append(f"unexpected {listed(unexpected)}")
    if misshapen := [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]:
        faults.append(f"another shape: {listed(misshapen)}")
    if faults:
        raise UserError(f"{where} does not fit {type(module).__name__}: {'; '.join(faults)}")


def is_meta(module: nn.Module) -> bool:
    """Whether the module was built on the meta device: shapes without values."""
    return next(module.parameters()).is_meta


def constructor_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor was called with, from its ``locals()``, as plain values for JSON."""
    return {
        name: value if isinstance(value, (bool, int, float, str, type(None))) else list(value)
        for name, value in given.items()
        if name not in ("self", "__class__")
    }


def listed(names: list[str]) -> str:
    """The first ten of some names, and how many there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more ({len(names)})" if rest > 0 else "")
