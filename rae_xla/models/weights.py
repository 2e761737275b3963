"""Weight files and strict loading into modules, with errors that list every mismatched key."""

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

_MAX_NAMES = 10  # in an error message


def read_weight_file(path: str | Path, name: str) -> Any:
    """Read a ``.safetensors`` or ``torch.save`` file to the CPU.

    Args:
        path: the file; a suffix other than ``.safetensors`` means ``torch.save``.
        name: configuration key or description of the file, for error messages.

    Raises:
        UserError: if the file is missing or cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        return read_torch_file(path, name)
    _require_file(path, name)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{name}: {path} cannot be read as safetensors ({error}): copy it again or give another"
        ) from error


def read_torch_file(path: str | Path, name: str) -> Any:
    """Read a ``torch.save`` file of tensors and plain containers to the CPU.

    Args:
        path: the file.
        name: configuration key or description of the file, for error messages.

    Raises:
        UserError: if the file is missing, cannot be read, or contains other objects, whose
            unpickling could run arbitrary code.
    """
    path = Path(path).expanduser()
    _require_file(path, name)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a file that is not a pickle
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{name}: {path} contains objects other than tensors and plain containers "
                f"({code[1]}), and was not read because unpickling them can run arbitrary code; "
                "use a file that contains only a state dict"
            ) from None
        # PyTorch's message recommends weights_only=False, which would disable the protection.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "not a pickle of tensors" if unsafe else str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: {path} cannot be read as a torch file ({reason}): copy it again "
            "or give another"
        ) from error


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
        tensors: tensors by key, on any device.
        path: the file; its folder is created.
        metadata: text stored in the file's header.

    Raises:
        UserError: if the file cannot be written; no partial file remains.
    """
    # Copies, because safetensors does not accept tensors that share memory.
    separate = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    _write(
        path,
        lambda unfinished: save_file(separate, unfinished, {"format": "pt", **(metadata or {})}),
    )


def write_torch_file(content: Any, path: Path) -> None:
    """Write a ``torch.save`` file atomically; its folder is created.

    Raises:
        UserError: if the file cannot be written; no partial file remains.
    """
    _write(path, lambda unfinished: torch.save(content, unfinished))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    # PyTorch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        reason = str(error).partition("\n")[0]
        if not isinstance(error, OSError):
            reason += "; usually there is no space left, or a file size limit"
        raise UserError(
            f"cannot write {path} ({reason}): free some space or give another path"
        ) from error


# How to create the file of a configuration key, for error messages.
_HINTS = {
    "normalization_stat_path": "; create it by `rae-xla stats` (stage_1.params)",
    "pretrained_decoder_path": (
        "; create it by `rae-xla checkpoints export RUN --what decoder` (stage_1.params)"
    ),
}


def _require_file(path: Path, name: str) -> None:
    if path.is_dir():
        raise UserError(f"{name}: {path} is a folder; give a file")
    if not path.is_file():
        raise UserError(f"{name}: {path} does not exist{_HINTS.get(name, '')}")


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str, *, assign: bool = False
) -> None:
    """Load ``state`` into ``module``; keys and shapes must match exactly.

    Args:
        module: the module to load.
        state: tensors by state-dict key.
        source: description of the weights' origin, for error messages.
        assign: use the tensors of ``state`` as the module's, which a module on the meta device
            requires, instead of copying their values.

    Raises:
        UserError: if keys are missing, unexpected, or have another shape; the message lists them.
    """
    check_fits(module, state, source)
    module.load_state_dict(dict(state), assign=assign)


def check_fits(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Compare keys and shapes of ``state`` with those of ``module``, without loading.

    Args:
        module: the module that the state is for.
        state: tensors by state-dict key, which may be on the meta device.
        source: description of the weights' origin, for error messages.

    Raises:
        UserError: if keys are missing, unexpected, or have another shape; the message lists them.
    """
    own = module.state_dict()
    mismatches = []
    if missing := [key for key in own if key not in state]:
        mismatches.append(f"missing {join_names(missing)}")
    if unexpected := [key for key in state if key not in own]:
        mismatches.append(f"unexpected {join_names(unexpected)}")
    if misshapen := [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]:
        mismatches.append(f"another shape: {join_names(misshapen)}")
    if mismatches:
        raise UserError(f"{source} does not fit {type(module).__name__}: {'; '.join(mismatches)}")


def is_meta(module: nn.Module) -> bool:
    """Return whether the module is on the meta device, where tensors have no values."""
    return next(module.parameters()).is_meta


def constructor_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor, given its ``locals()``, as values for JSON."""
    return {
        name: value if isinstance(value, (bool, int, float, str, type(None))) else list(value)
        for name, value in given.items()
        if name not in ("self", "__class__")
    }


def join_names(names: list[str]) -> str:
    """Join names for an error message: the first ten, and the number of the others."""
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more ({len(names)})" if rest > 0 else "")
