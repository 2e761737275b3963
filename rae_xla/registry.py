"""Names in configuration files to classes, and weights into what they build.

The reference names its classes by the Python path of its own modules; those names stand in
everybody's YAML files and are understood here beside ours. Classes are imported when they are
first built, so reading a configuration imports no model.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rae_xla.config import ModelSpec

# Where each class lives, and the other names it answers to: its short name, then the published.
TARGETS: dict[str, tuple[str, ...]] = {
    "rae_xla.models.rae.RAE": ("RAE", "stage1.RAE", "stage1.rae.RAE"),
    "rae_xla.models.dit_dh.DiTDH": (
        "DiTDH",
        "DiTwDDTHead",
        "stage2.models.DDT.DiTwDDTHead",
        "stage2.DiTwDDTHead",
    ),
    "rae_xla.models.dit.LightningDiT": (
        "LightningDiT",
        "stage2.models.lightningDiT.LightningDiT",
        "stage2.LightningDiT",
    ),
    "rae_xla.models.vit_decoder.ViTDecoder": (
        "ViTDecoder",
        "GeneralDecoder",
        "stage1.decoders.GeneralDecoder",
        "stage1.decoders.decoder.GeneralDecoder",
    ),
    "rae_xla.models.encoders.DINOv2Encoder": (
        "DINOv2Encoder",
        "Dinov2withNorm",
        "stage1.encoders.dinov2.Dinov2withNorm",
    ),
    "rae_xla.models.encoders.SigLIP2Encoder": (
        "SigLIP2Encoder",
        "SigLIP2wNorm",
        "stage1.encoders.siglip2.SigLIP2wNorm",
    ),
    "rae_xla.models.encoders.MAEEncoder": (
        "MAEEncoder",
        "MAEwNorm",
        "stage1.encoders.mae.MAEwNorm",
    ),
}
_BY_NAME = {name: full for full, names in TARGETS.items() for name in (full, *names)}


def full_name(target: str) -> str:
    """The place of the class a name stands for, as ``package.module.Class``.

    Raises:
        UserError: no such name; the message has the nearest one.
    """
    try:
        return _BY_NAME[target]
    except KeyError:
        pass
    near = difflib.get_close_matches(target, _BY_NAME, n=1, cutoff=0.5)
    # A wrong path in front of a right class name is the usual slip, and far by edit distance.
    near = near or [n for n in _BY_NAME if n == target.rsplit(".", 1)[-1]]
    hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(sorted(_BY_NAME))
    raise UserError(f"unknown target {target!r}: {hint}")


def find_class(target: str) -> type[nn.Module]:
    """Import the class a name stands for."""
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
        UserError: an unknown target or parameter, a missing checkpoint, or one of another shape.
    """
    target, params, ckpt = _parts(spec)
    cls = find_class(target)
    _check_params(cls, target, params)
    model = cls(**params)
    if ckpt is not None:
        load_weights(model, ckpt)
    return model


def _parts(spec: ModelSpec | Mapping[str, Any]) -> tuple[str, dict[str, Any], str | None]:
    if not isinstance(spec, Mapping):
        return spec.target, dict(spec.params), spec.ckpt
    for name in spec:
        if name not in ("target", "params", "ckpt"):
            raise UserError(f"a model has target, params and ckpt, not {name!r}")
    if not isinstance(spec.get("target"), str):
        raise UserError("a model needs a `target`: the name of a class, such as stage1.RAE")
    return spec["target"], dict(spec.get("params") or {}), spec.get("ckpt")


def _check_params(cls: type, target: str, params: Mapping[str, Any]) -> None:
    valid = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in valid.values()):
        return
    for name in params:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
            raise UserError(f"{target} takes no parameter {name!r}: {hint}")
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in params]
    if missing:
        raise UserError(f"{target} needs the parameter{'s' * (len(missing) > 1)} {missing}")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a file (.pt, .pth, .safetensors) into ``model``, strictly.

    Raises:
        UserError: the file is missing, unreadable, or its keys or shapes are another model's.
    """
    state = read_state_dict(path)
    own = model.state_dict()
    shapes = [
        f"{k} is {_shape(state[k])} in the file, {_shape(own[k])} in the model"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    faults = {
        "of another shape": shapes,
        "missing from the file": [k for k in own if k not in state],
        "unknown to the model": [k for k in state if k not in own],
    }
    text = "; ".join(f"{len(v)} {what} ({_first(v)})" for what, v in faults.items() if v)
    if text:
        raise UserError(
            f"checkpoint {path} does not fit {type(model).__name__}: of {len(own)} tensors, {text}."
            " Compare the model's params with those it was trained with."
        )
    model.load_state_dict(state, strict=True)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights of a file on the CPU: ``ema`` of a training checkpoint, or a state dict.

    Raises:
        UserError: there is no such file, or it holds no weights that can be used.
    """
    import torch

    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; give one .pt or .safetensors file in it")
    if not path.exists():
        raise UserError(f"no checkpoint at {path}{_near_files(path)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has error types of its own; all mean the same here
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"checkpoint {path} cannot be read as weights: {reason}") from error
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
        raise UserError(f"checkpoint {path} is no state dict: no tensors at {_first(strangers)}")
    return dict(content)


def _shape(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape) or "a scalar"


def _first(items: list[str], count: int = 3) -> str:
    return ", ".join(items[:count]) + (", …" if len(items) > count else "")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (and no folder {path.parent}; the working directory is {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return f". Near it in that folder: {', '.join(near)}" if near else ""
