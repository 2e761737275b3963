"""How a diffusion transformer was built, read off its state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rae_xla.config import ModelSpec
from rae_xla.config.targets import full_name
from rae_xla.errors import UserError
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH

CLASSES: dict[str, type[nn.Module]] = {"DiTDH": DiTDH, "LightningDiT": LightningDiT}


def is_dit(state: Mapping[str, Any]) -> bool:
    """Whether names are those of a DiTDH or a LightningDiT."""
    return {"x_embedder.proj.weight", "final_layer.linear.weight"} <= state.keys()


def dit_settings(spec: ModelSpec) -> tuple[str, dict[str, Any]] | None:
    """Class name and constructor arguments as a configuration says them; None: of another class."""
    kind = full_name(spec.target).rsplit(".", 1)[1]
    return (kind, dict(spec.params)) if kind in CLASSES else None


def infer_settings(state: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Class name and constructor arguments of the model that has these weights.

    The label dropout's probability is not in the weights: 0.1, as published, where there is a row
    for the null label; and so is whether ``num_classes`` counts that row, which is taken to be.

    Args:
        state: published keys.
        where: what to call it in errors.

    Raises:
        UserError: it is no such model, or more than one could have these weights.
    """
    if not is_dit(state):
        raise UserError(f"{where} is no diffusion transformer: it has no x_embedder.proj.weight")
    try:
        return _dit_dh(state) if "s_embedder.proj.weight" in state else _lightning(state)
    except (KeyError, _AmbiguousError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: how the model was built cannot be read off its weights ({reason}): give the "
            "run's YAML (--config)"
        ) from error


class _AmbiguousError(Exception):
    """More than one model could have these weights."""


def _dit_dh(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    head_width, channels = state["x_embedder.proj.weight"].shape[:2]
    width, patch_channels = state["s_embedder.proj.weight"].shape[:2]
    if patch_channels != channels:
        raise _AmbiguousError("its encoder has patches of another size than 1")
    if width == head_width:
        raise _AmbiguousError("encoder and head have the same width")
    widths = [state[f"blocks.{i}.attn.proj.weight"].shape[0] for i in range(_depth(state))]
    heads = [_heads(state, f"{part}_feat_rope", w) for part, w in _both(width, head_width)]
    grid = _side(state["enc_feat_rope.freqs_cos"].shape[0])
    return "DiTDH", {
        "input_size": grid,
        "patch_size": 1,
        "in_channels": channels,
        "hidden_size": [width, head_width],
        "depth": [widths.count(width), widths.count(head_width)],
        "num_heads": heads,
        "use_pos_embed": "pos_embed" in state,
        **_common(state),
    }


def _lightning(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    return "LightningDiT", {
        "input_size": _side(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _depth(state),
        "num_heads": _heads(state, "feat_rope", width),
        "learn_sigma": out_channels == 2 * channels,
        "use_gembed": "t_embedder.W" in state,
        **_common(state),
    }


def _common(state: Mapping[str, Tensor]) -> dict[str, Any]:
    swiglu = "blocks.0.mlp.w3.weight" in state
    modulation = state["blocks.0.adaLN_modulation.1.weight"]
    return {
        "mlp_ratio": _mlp_ratio(state, swiglu),
        "class_dropout_prob": 0.1,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": swiglu,
        "use_rope": True,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": modulation.shape[0] == 4 * modulation.shape[1],
    }


def _mlp_ratio(state: Mapping[str, Tensor], swiglu: bool) -> float:
    name = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    width, hidden = state[name].shape
    for ratio in (4.0, *(quarters / 4 for quarters in range(1, 65))):
        inner = int(width * ratio)
        if (int(2 / 3 * inner) if swiglu else inner) == hidden:
            return ratio
    raise _AmbiguousError(f"a feed-forward layer of {hidden} on a width of {width}")


def _heads(state: Mapping[str, Tensor], rope: str, width: int) -> int:
    if f"{rope}.freqs_cos" not in state:
        raise _AmbiguousError("without rotary positions the number of heads is not in it")
    return width // state[f"{rope}.freqs_cos"].shape[1]


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _side(tokens: int) -> int:
    return math.isqrt(tokens)


def _both(width: int, head_width: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("enc", width), ("dec", head_width)
