"""From names in configuration files to models with their weights.

Classes are imported when they are first built, so that reading a configuration imports no model.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla.config.sections import ModelSpec
from rae_xla.config.targets import full_name
from rae_xla.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def find_class(target: str) -> type[nn.Module]:
    """Import the class a name stands for (the names: ``rae_xla.config.targets``)."""
    module, name = full_name(target).rsplit(".", 1)
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


def instantiate(spec: ModelSpec | Mapping[str, Any]) -> nn.Module:
    """Build the model a configuration names, and load its weights where ``ckpt`` says so.

    Args:
        spec: ``{"target": name, "params": {...}, "ckpt": path or None}``, or a ``ModelSpec``.

    ``ckpt`` follows the published rule: the ``ema`` weights of a training checkpoint, or a file
    that is a state dict; every key and shape must fit.

    Raises:
        UserError: an unknown target or parameter, a missing checkpoint, one of another shape, or
            files of an autoencoder that do not belong together (``docs/interop.md``).
    """
    spec = spec if isinstance(spec, ModelSpec) else _as_spec(spec)
    cls = find_class(spec.target)
    _check_keywords(cls, spec)
    model = cls(**spec.params)
    _check_manifests(model, spec)
    if spec.ckpt is not None:
        load_weights(model, spec.ckpt)
    return model


def _as_spec(given: Mapping[str, Any]) -> ModelSpec:
    for name in given:
        if name not in ("target", "params", "ckpt"):
            raise UserError(f"a model is given by target, params and ckpt; it has no {name!r}")
    if not isinstance(given.get("target"), str):
        raise UserError("a model needs a target: the name of a class, such as stage1.RAE")
    return ModelSpec(given["target"], dict(given.get("params") or {}), given.get("ckpt"))


def _check_keywords(cls: type, spec: ModelSpec) -> None:
    valid = inspect.signature(cls).parameters
    for name in spec.params:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
            raise UserError(f"{spec.target} takes no parameter {name!r}: {hint}")
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in spec.params]
    if missing:
        raise UserError(f"{spec.target} needs the parameters {', '.join(missing)}")


def _check_manifests(model: nn.Module, spec: ModelSpec) -> None:
    from rae_xla.models.rae import RAE

    if isinstance(model, RAE) and not next(model.parameters()).is_meta:
        from rae_xla.interop.belonging import check_rae_files

        check_rae_files(model, spec.params)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights in a file (.pt, .pth, .safetensors) or a training checkpoint into
    ``model``, strictly.

    Raises:
        UserError: the file is missing, unreadable, or its keys or shapes are another model's.
    """
    from rae_xla.models.weights import load_strict

    state = read_state_dict(path)
    try:
        load_strict(model, state, f"checkpoint {path}")
    except UserError as error:
        if {name.partition(".")[0] for name in state} >= {"encoder", "decoder"}:
            raise UserError(
                f"checkpoint {path} is an autoencoder's, of stage 1: give a checkpoint of stage 2"
            ) from None
        raise UserError(f"{error}. Build the model with the params it was trained with.") from None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file or checkpoint, on the CPU: ``ema`` of a training checkpoint, or a
    state dict.

    Raises:
        UserError: there is nothing there, or it holds no weights that can be used.
    """
    import torch

    content = _read(path)
    if isinstance(content, Mapping) and "ema" in content:
        content = content["ema"]
    elif isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        raise UserError(
            f"checkpoint {path} is a training checkpoint without averaged (`ema`) weights. To use"
            " its plain weights, save `torch.load(file)['model']` to a file of its own."
        )
    if not isinstance(content, Mapping):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    strangers = [str(k) for k, v in content.items() if not isinstance(v, torch.Tensor)]
    if strangers:
        names = ", ".join(strangers[:5])
        raise UserError(f"checkpoint {path} is no state dict: there are no tensors at {names}")
    return dict(content)


def _read(given: str | Path) -> Any:
    from rae_xla.interop.checkpoint_tensors import open_weights

    path = Path(given).expanduser()
    if "://" not in str(given) and not path.exists():
        raise UserError(f"there is no checkpoint {path}{_near(path)}")
    return open_weights(given)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a folder {path.parent} (the working directory is {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return f"; near it in that folder: {', '.join(near)}" if near else ""
