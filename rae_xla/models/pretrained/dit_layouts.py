"""State dicts of diffusion transformers in the layout of RAEv2, and their conversion.

Models have the parameter names of RAE, which stores the projections of an attention or SwiGLU layer
as one matrix. RAEv2 (nanovisionx/RAEv2 @ 8a0d238) publishes models with in-context conditioning,
which RAE does not have, under other names and with a matrix for each projection. Files in that
layout are converted when they are read, and models with in-context conditioning when they are
written for others. Training checkpoints have the names of the models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# A fused layer -> the layers that RAEv2 stores, in the order of the rows.
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}
# Names of ours -> names of RAEv2, as regular expressions and replacements.
_RENAMED = (
    (r"^y_embedder\.", "ctx_embedder."),
    (r"^enc_feat_rope\.", "enc_rope."),
    (r"^dec_feat_rope\.", "dec_rope."),
    (r"^feat_rope\.", "rope."),
    (r"\.adaLN_modulation\.", ".adaln_modulation."),
)
_FINAL_NORM = r"^(base_)?final_layer\.norm_final\.", r"\1final_layer.norm."  # of DiTDH only
_BACK = (
    (r"^ctx_embedder\.", "y_embedder."),
    (r"^enc_rope\.", "enc_feat_rope."),
    (r"^dec_rope\.", "dec_feat_rope."),
    (r"^rope\.", "feat_rope."),
    (r"\.adaln_modulation\.", ".adaLN_modulation."),
    (r"^(base_)?final_layer\.norm\.", r"\1final_layer.norm_final."),
)


def is_raev2(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of a diffusion transformer in the layout of RAEv2."""
    return "blocks.0.attn.q.weight" in state


def from_raev2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict in the layout of RAEv2 to the names of our models.

    Others are returned unchanged, and so are keys that the layout does not have: strict loading
    reports them.
    """
    if not is_raev2(state):
        return dict(state)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fused, parts = _fused_layer(name)
        if fused is None:
            result[_rename(name, _BACK)] = tensor
        elif name == parts[0] and all(part in state for part in parts):
            result[fused] = torch.cat([state[part] for part in parts])
        elif not all(part in state for part in parts):
            result[name] = tensor
    return result


def to_raev2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of one of our models to the layout of RAEv2.

    Models without in-context conditioning, which RAEv2 does not have, are returned unchanged.
    """
    if "t_embedder.learnable_tokens" not in state:
        return dict(state)
    renamed: tuple[tuple[str, str], ...] = _RENAMED
    if "s_embedder.proj.weight" in state:
        renamed = (*_RENAMED, _FINAL_NORM)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        fused = next((key for key in _FUSED if layer.endswith("." + key)), None)
        if fused is None:
            result[_rename(name, renamed)] = tensor
            continue
        parts = _FUSED[fused]
        for part, rows in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[f"{layer.removesuffix(fused)}{part}.{last}"] = rows.contiguous()
    return result


def _fused_layer(name: str) -> tuple[str | None, list[str]]:
    """Return the fused tensor that a tensor of RAEv2 is a part of, and the names of all parts."""
    layer, _, last = name.rpartition(".")
    for fused, parts in _FUSED.items():
        for part in parts:
            if layer.endswith("." + part):
                owner = layer.removesuffix(part)
                return f"{owner}{fused}.{last}", [f"{owner}{one}.{last}" for one in parts]
    return None, []


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
