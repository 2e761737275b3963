"""Selected weights: the state dict in the content of a file or checkpoint.

All readers of weights use ``select_weights``: ``ckpt`` in a configuration, ``convert``, ``export``,
``evaluate`` and ``from_pretrained`` accept the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.pretrained.dit_layouts import from_raev2
from rae_xla.models.state_dicts import strip_wrappers
from rae_xla.models.weights import join_names

PARTS = ("model", "ema", "disc")
"""The state dicts of a training checkpoint, ours or the published code's."""


@dataclass(frozen=True)
class SelectedWeights:
    """A state dict, and what it was part of.

    Attributes:
        state: tensors by name, without the prefixes of wrapper modules.
        container: one line for people.
        part: of a training checkpoint, one of ``PARTS``; None: there was only one state dict.
        config: the configuration of the run, if the checkpoint stores it.
    """

    state: dict[str, Tensor]
    container: str
    part: str | None = None
    config: Mapping[str, Any] | None = None


def select_weights(content: Any, source: str, part: str = "ema") -> SelectedWeights:
    """Return the state dict in the content of a file or checkpoint.

    Args:
        content: a state dict; a training checkpoint, with the keys ``model`` and ``ema``; or a
            mapping with a state dict at ``state_dict``.
        source: where it comes from, for error messages.
        part: which of ``PARTS``, for a training checkpoint.

    Raises:
        UserError: there is no state dict, or not this one.
    """
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{source} holds a {type(content).__name__}, no weights: give a weight file, which "
            "holds a state dict"
        )
    present = [name for name in PARTS if _is_part(content, name)]
    if {"model", "ema"} & {*present}:
        selected = content[part] if part in present else None
        if not selected:
            raise UserError(_missing(content, source, part, present))
        config = content.get("config")
        return SelectedWeights(
            _tensors(selected, f"{part!r} in {source}"),
            f"training checkpoint of step {content.get('step')}, {part} weights",
            part,
            config if isinstance(config, Mapping) else None,
        )
    inner = content.get("state_dict")
    if isinstance(inner, Mapping) and inner:
        return SelectedWeights(_tensors(inner, source), "state dict of a checkpoint")
    return SelectedWeights(_tensors(content, source), "state dict")


def _is_part(content: Mapping[str, Any], name: str) -> bool:
    # A sharded checkpoint reads a part when it is accessed; its parts are always mappings.
    return name in content and (not isinstance(content, dict) or isinstance(content[name], Mapping))


def _missing(content: Mapping[str, Any], source: str, part: str, present: list[str]) -> str:
    others = [name for name in present if name != part and content[name]]
    message = f"{source} has no {part!r} weights; it has {', '.join(others) or 'no others'}"
    if part == "ema" and "model" in others:
        message += (
            ". It is a training checkpoint without averaged (`ema`) weights: for its plain ones, "
            "give `--weights model`, or, for a `ckpt` of a configuration, write them to a file: "
            "`rae-xla convert FILE --weights model --to safetensors --out model.safetensors`"
        )
    return message


def _tensors(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{source} is not a state dict: no tensors at {join_names(others)}")
    return from_raev2(strip_wrappers(content, source))
