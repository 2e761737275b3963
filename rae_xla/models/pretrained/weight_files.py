"""Weight files: read one and identify the model that its weights belong to.

The formats read here are ``.pt`` and ``.safetensors`` files. Packages above ``models`` add others
with ``register_reader``: ``rae_xla.interop`` adds training checkpoints and results folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.pretrained.dit_settings import is_dit
from rae_xla.models.pretrained.selected_weights import select_weights
from rae_xla.models.weights import join_names, read_weight_file

PARTS = ("rae", "decoder", "stage2", "discriminator", "stats")
_DESCRIPTIONS = {
    "rae": "an autoencoder",
    "decoder": "a decoder",
    "stage2": "a diffusion transformer",
    "discriminator": "a discriminator",
    "stats": "latent statistics",
}


@dataclass(frozen=True)
class IdentifiedWeights:
    """Weights from a file or checkpoint, and what they are.

    Attributes:
        source: the file or checkpoint.
        part: one of ``PARTS``.
        description: one line for people.
        state: tensors by their published names; for ``stats``, ``var`` and optionally ``mean``.
        config: the configuration of the run, if the checkpoint stores it.
    """

    source: str
    part: str
    description: str
    state: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class WeightsReader:
    """Reads weights from a format that this package does not know.

    Attributes:
        matches: whether the reader handles a path or URL.
        read: returns the location that was read (such as the newest checkpoint of a results folder)
            and its content: a state dict, or a mapping like that of a ``.pt`` checkpoint
            (``step``, ``config``, ``model``, ``ema``). Raises ``UserError``.
    """

    matches: Callable[[str], bool]
    read: Callable[[str], tuple[str, Mapping[str, Any]]]


_READERS: dict[str, WeightsReader] = {}


def register_reader(name: str, reader: WeightsReader) -> None:
    """Add a reader to ``open_weights_source`` and ``from_pretrained``, or replace it by name.

    Call it when the package that implements the reader is imported: readers are part of what is
    installed, not state of a run.
    """
    _READERS[name] = reader


def open_weights_source(
    path: str | Path, part: str | None = None, weights: str = "ema"
) -> IdentifiedWeights:
    """Read weights of the published layout, or from a training checkpoint.

    Args:
        path: a ``.pt`` or ``.safetensors`` file, or what a registered reader handles.
        part: the part to return, if there are several; None: all of the model.
        weights: ``ema`` or ``model``, for a training checkpoint.

    Raises:
        UserError: the source cannot be read, is of an unknown kind, or does not have that part.
    """
    name = str(path)
    for reader in _READERS.values():
        if reader.matches(name):
            return identify_weights(*reader.read(name), part, weights)
    if Path(path).expanduser().is_dir() or "://" in name:
        raise UserError(
            f"{path} is not a weight file; `import rae_xla.interop` first to read training "
            "checkpoints and results folders"
        )
    return identify_weights(name, read_weight_file(path, "checkpoint"), part, weights)


def identify_weights(
    source: str, content: Any, part: str | None = None, weights: str = "ema"
) -> IdentifiedWeights:
    """Identify the content of a weight file or checkpoint; see ``open_weights_source``."""
    selected = select_weights(content, source, "disc" if part == "discriminator" else weights)
    state = selected.state
    found = _part_of(state, source)
    if part not in (None, found):
        if (found, part) != ("rae", "decoder"):
            raise UserError(
                f"{source} holds the weights of {_DESCRIPTIONS[found]}, "
                f"not of {_DESCRIPTIONS[part]}"
            )
        state = {k.removeprefix("decoder."): v for k, v in state.items() if k[:8] == "decoder."}
        found = "decoder"
    description = f"{selected.container}: {_DESCRIPTIONS[found]}, {len(state)} tensors"
    return IdentifiedWeights(source, found, description, state, selected.config)


def _part_of(state: Mapping[str, Tensor], source: str) -> str:
    """Return which of ``PARTS`` has these keys."""
    if "var" in state and state.keys() <= {"mean", "var"}:
        return "stats"
    if is_dit(state):
        return "stage2"
    if "decoder_embed.weight" in state:
        return "decoder"
    if "decoder.decoder_embed.weight" in state:
        return "rae"
    # A training checkpoint has the discriminator's heads; the published file its frozen backbone.
    if all(name.startswith("heads.") for name in state) or _is_backbone(state):
        return "discriminator"
    raise UserError(
        f"{source} holds no decoder, autoencoder, diffusion transformer, discriminator or latent "
        f"statistics in a known layout. Its keys: {join_names(list(state))}"
    )


def _is_backbone(state: Mapping[str, Tensor]) -> bool:
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys()
