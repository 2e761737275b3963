"""Constructor arguments of a diffusion transformer, inferred from its state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError

DIT_CLASSES = {
    "DiTDH": "DiTDH",
    "DiTwDDTHead": "DiTDH",
    "DiTwDDTHeadIG": "DiTDH",
    "LightningDiT": "LightningDiT",
    "LightningDiTIG": "LightningDiT",
}
"""Last component of a configuration's ``target`` (ours or published) -> name of our class."""


def is_dit(state: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of a DiTDH or a LightningDiT."""
    return {"x_embedder.proj.weight", "final_layer.linear.weight"} <= state.keys()


def recorded_settings(
    target: str, params: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]] | None:
    """Return the class name and constructor arguments of a configuration's ``stage_2`` section.

    Returns:
        None if ``target`` names neither a DiTDH nor a LightningDiT.
    """
    kind = DIT_CLASSES.get(target.rsplit(".", 1)[-1])
    return None if kind is None else (kind, dict(params or {}))


def infer_settings(state: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Any]]:
    """Infer the class name and constructor arguments of a diffusion transformer.

    Weights do not determine two arguments: the probability of label dropout, for which the
    published 0.1 is returned, and whether ``num_classes`` includes the row of the null label, which
    is assumed to come on top.

    Args:
        state: state dict with the published keys.
        source: where it comes from, for error messages.

    Raises:
        UserError: it is not such a model, or several models could have these weights.
    """
    if not is_dit(state):
        raise UserError(
            f"{source} is not a diffusion transformer: it has no x_embedder.proj.weight"
        )
    try:
        return _dit_dh(state) if "s_embedder.proj.weight" in state else _lightning(state)
    except (KeyError, _AmbiguousError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{source}: the model's settings cannot be inferred from its weights ({reason}): give "
            "the YAML file of its run (--config)"
        ) from error


class _AmbiguousError(Exception):
    """Several models could have these weights."""


def _dit_dh(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    head_width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    width, patch_channels = state["s_embedder.proj.weight"].shape[:2]
    if patch_channels != channels:
        raise _AmbiguousError("the encoder's patch size is not 1")
    if width == head_width:
        raise _AmbiguousError("encoder and head have the same width")
    widths = [state[f"blocks.{i}.attn.proj.weight"].shape[0] for i in range(_depth(state))]
    return "DiTDH", {
        "input_size": math.isqrt(state["dec_feat_rope.freqs_cos"].shape[0]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": [width, head_width],
        "depth": [widths.count(width), widths.count(head_width)],
        "num_heads": [
            _heads(state, "enc_feat_rope", width),
            _heads(state, "dec_feat_rope", head_width),
        ],
        "use_pos_embed": "pos_embed" in state,
        **_common(state),
    }


def _lightning(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    return "LightningDiT", {
        "input_size": math.isqrt(_patches(state)) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": _depth(state),
        "num_heads": _heads(state, "feat_rope", width),
        "learn_sigma": out_channels == 2 * channels,
        "use_gembed": "t_embedder.W" in state,
        "use_pos_embed": "pos_embed" in state,
        **_common(state),
    }


def _common(state: Mapping[str, Tensor]) -> dict[str, Any]:
    for head in ("base_final_layer.linear.weight", "repa_projector.weight"):
        if head in state:
            raise _AmbiguousError(f"the block that {head.split('.')[0]} reads is unknown")
    swiglu = "blocks.0.mlp.w3.weight" in state
    modulation = state.get(f"blocks.{_depth(state) - 1}.adaLN_modulation.1.weight")
    context = _context_tokens(state)
    return {
        "mlp_ratio": _mlp_ratio(state, swiglu),
        "class_dropout_prob": 0.1,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": swiglu,
        "use_rope": True,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": modulation is not None and modulation.shape[0] == 4 * modulation.shape[1],
        **(
            {}
            if context is None
            else {"conditioning": "tokens", "num_t_tokens": context[0], "num_c_tokens": context[1]}
        ),
    }


def _context_tokens(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the numbers of time and label tokens; None without in-context conditioning."""
    if "t_embedder.learnable_tokens" not in state:
        return None
    time, label = (state[f"{name}_embedder.learnable_tokens"].shape[0] for name in "ty")
    return time, label


def _patches(state: Mapping[str, Tensor]) -> int:
    """Return the number of tokens of a latent in a LightningDiT."""
    if "pos_embed" in state:
        return state["pos_embed"].shape[1]
    if "feat_rope.freqs_cos" not in state:
        raise _AmbiguousError("without positions, the number of tokens is unknown")
    return state["feat_rope.freqs_cos"].shape[0] - sum(_context_tokens(state) or (0, 0))


def _mlp_ratio(state: Mapping[str, Tensor], swiglu: bool) -> float:
    name = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    width, hidden = state[name].shape
    for ratio in (4.0, *(quarters / 4 for quarters in range(1, 65))):
        inner = int(width * ratio)
        if (int(2 / 3 * inner) if swiglu else inner) == hidden:
            return ratio
    raise _AmbiguousError(f"a feed-forward width of {hidden} for a token width of {width}")


def _heads(state: Mapping[str, Tensor], rope: str, width: int) -> int:
    if f"{rope}.freqs_cos" not in state:
        raise _AmbiguousError("without rotary positions, the number of heads is unknown")
    return width // state[f"{rope}.freqs_cos"].shape[1]


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
