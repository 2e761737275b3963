"""Build models from the ``target``, ``params`` and ``ckpt`` of a configuration."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rae_xla.checkpoint.tensors import open_weights
from rae_xla.config.registry import full_name
from rae_xla.config.schema import ModelSpec
from rae_xla.errors import UserError
from rae_xla.models.pretrained.components import AutoencoderBase
from rae_xla.models.pretrained.manifest import check_rae_files
from rae_xla.models.pretrained.selected_weights import select_weights
from rae_xla.models.weights import is_meta, load_strict


def find_class(target: str) -> type[nn.Module]:
    """Import the class that a target names; the names are in ``rae_xla.config.registry``.

    Raises:
        UserError: the name is unknown.
    """
    module, name = full_name(target).rsplit(".", 1)
    cls: type[nn.Module] = getattr(importlib.import_module(module), name)
    return cls


def instantiate(spec: ModelSpec | Mapping[str, Any]) -> nn.Module:
    """Build the model that a configuration section describes, and load its weights.

    As in the published code, ``ckpt`` is a training checkpoint, whose ``ema`` weights are loaded,
    or a file with a state dict. Every key and shape must fit.

    Args:
        spec: ``{"target": name, "params": {...}, "ckpt": path or None}``, or a ``ModelSpec``.

    Raises:
        UserError: an unknown target or parameter, a missing checkpoint, keys or shapes that do not
            fit, or files of an autoencoder that do not match (``docs/interop.md``).
    """
    spec = spec if isinstance(spec, ModelSpec) else _to_spec(spec)
    cls = find_class(spec.target)
    _check_keywords(cls, spec)
    model = cls(**spec.params)
    if isinstance(model, AutoencoderBase) and not is_meta(model):
        check_rae_files(model, spec.params)
    if spec.ckpt is not None:
        load_weights(model, spec.ckpt)
    return model


def _to_spec(section: Mapping[str, Any]) -> ModelSpec:
    for name in section:
        if name not in ("target", "params", "ckpt"):
            raise UserError(f"a model section has target, params and ckpt, not {name!r}")
    if not isinstance(section.get("target"), str):
        raise UserError("a model section needs a target: the name of a class, such as stage1.RAE")
    return ModelSpec(section["target"], dict(section.get("params") or {}), section.get("ckpt"))


def _check_keywords(cls: type, spec: ModelSpec) -> None:
    valid = inspect.signature(cls).parameters
    for name in spec.params:
        if name not in valid:
            similar = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"valid: {', '.join(valid)}"
            raise UserError(f"{spec.target} has no parameter {name!r}: {hint}")
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in spec.params]
    if missing:
        raise UserError(f"{spec.target} needs the parameters {', '.join(missing)}")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a weight file (.pt, .pth, .safetensors) or training checkpoint into a model, strictly.

    Raises:
        UserError: the file is missing or unreadable, or its keys or shapes do not fit.
    """
    state = read_state_dict(path)
    try:
        load_strict(model, state, f"checkpoint {path}")
    except UserError as error:
        stage_1 = {name.partition(".")[0] for name in state} >= {"encoder", "decoder"}
        if stage_1 and not hasattr(model, "decoder"):
            raise UserError(
                f"checkpoint {path} holds an autoencoder (stage 1): give a checkpoint of stage 2"
            ) from None
        raise UserError(f"{error}. Build the model with the params it was trained with.") from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file or training checkpoint to the CPU.

    Returns:
        The ``ema`` weights of a training checkpoint, or the state dict in a file; see
        ``models.pretrained.selected_weights``.

    Raises:
        UserError: the file is missing or holds no such weights.
    """
    return select_weights(_open(path), f"checkpoint {path}").state


def _open(name: str | Path) -> Any:
    path = Path(name).expanduser()
    if "://" not in str(name) and not path.exists():
        raise UserError(f"there is no checkpoint {path}{_similar_files(path)}")
    return open_weights(name)


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a folder {path.parent} (the working directory is {Path.cwd()})"
    similar = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return f"; similar names in its folder: {', '.join(similar)}" if similar else ""
