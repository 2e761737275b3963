"""What a file or folder of weights is: found out from its names, said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_tensors import find_weights, open_weights
from rae_xla.interop.dit_settings import is_dit
from rae_xla.models.weights import listed

PARTS = ("rae", "decoder", "stage2", "discriminator", "stats")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Source:
    """Weights out of a file or a checkpoint.

    Attributes:
        where: the file or checkpoint.
        part: one of ``PARTS``.
        about: what it was found to be, in words.
        state: tensors by their published names; of ``stats`` ``var`` and maybe ``mean``.
        config: the run's configuration, where a checkpoint has it.
    """

    where: str
    part: str
    about: str
    state: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None


def open_source(path: str | Path, part: str | None = None, weights: str = "ema") -> Source:
    """Read weights of the published layout, or of a training checkpoint, ours or the reference's.

    Args:
        path: a ``.pt`` or ``.safetensors`` file, a checkpoint, or a results folder.
        part: which of them, where there are several; None: all of an autoencoder or the network.
        weights: of a training checkpoint: ``ema`` or ``model``.

    Raises:
        UserError: it cannot be read, is nothing of the kind, or has no such part.
    """
    where = find_weights(path)
    content = open_weights(where)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where} holds a {type(content).__name__}, no weights")
    kept = "state dict"
    config = None
    if "model" in content or "ema" in content:
        step = content.get("step")
        config = content.get("config") if isinstance(content.get("config"), Mapping) else None
        name = "disc" if part == "discriminator" else weights
        kept = f"training checkpoint of step {step}, {name} weights"
        chosen = content.get(name)
        if not isinstance(chosen, Mapping) or not chosen:
            others = [other for other in ("model", "ema", "disc") if other != name]
            there = ", ".join(other for other in others if content.get(other)) or "no others"
            raise UserError(f"{where} has no {name!r} weights; it has {there}")
        content = chosen
    state = _tensors(content, where)
    found = _part_of(state, where)
    if part not in (None, found):
        if (found, part) != ("rae", "decoder"):
            raise UserError(f"{where} holds the weights of {_WORDS[found]}, not of {_WORDS[part]}")
        state = {k.removeprefix("decoder."): v for k, v in state.items() if k[:8] == "decoder."}
        found = "decoder"
    return Source(where, found, f"{kept}: {_WORDS[found]}, {len(state)} tensors", state, config)


_WORDS = {
    "rae": "an autoencoder",
    "decoder": "a decoder",
    "stage2": "a diffusion transformer",
    "discriminator": "a discriminator",
    "stats": "latent statistics",
}


def _tensors(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    strangers = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strangers:
        raise UserError(f"{where} is no state dict: there are no tensors at {listed(strangers)}")
    state = dict(content)
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _part_of(state: Mapping[str, Tensor], where: str) -> str:
    if "var" in state and state.keys() <= {"mean", "var"}:
        return "stats"
    if is_dit(state):
        return "stage2"
    if "decoder_embed.weight" in state:
        return "decoder"
    if "decoder.decoder_embed.weight" in state:
        return "rae"
    # The heads of a training checkpoint, or the frozen network they stand on as published.
    if all(name.startswith("heads.") for name in state) or _is_backbone(state):
        return "discriminator"
    raise UserError(
        f"{where} holds no weights that are known here: no decoder, autoencoder, diffusion "
        f"transformer, discriminator or latent statistics. Its keys: {listed(list(state))}"
    )


def _is_backbone(state: Mapping[str, Tensor]) -> bool:
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys()
