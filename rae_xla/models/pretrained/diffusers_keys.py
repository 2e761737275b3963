"""State-dict keys of diffusers' ``AutoencoderRAE`` and their published equivalents.

The decoder's keys are diffusers' own. The encoder's are those of the installed transformers: the
six published repositories have the keys of transformers 4. transformers 5 renamed its layers, and
diffusers then leaves weights that it does not find under the new keys at random values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.weights import join_names

ENCODER_TYPES = {"dinov2": "Dinov2withNorm", "siglip2": "SigLIP2wNorm", "mae": "MAEwNorm"}
POSITIONS = "decoder.decoder_pos_embed"  # not stored by diffusers, which computes its own
DIFFUSERS_ONLY = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
TRANSFORMERS_VERSIONS = (4, 5)

_DECODER = (
    (".attention.attention.query.", ".attention.to_q."),
    (".attention.attention.key.", ".attention.to_k."),
    (".attention.attention.value.", ".attention.to_v."),
    (".attention.output.dense.", ".attention.to_out.0."),
)
_ATTENTION_5 = (
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
)
_ENCODER_5 = {
    "dinov2": _ATTENTION_5,
    "siglip2": (),
    "mae": (
        ("encoder.encoder.layer.", "encoder.layers."),
        *_ATTENTION_5,
        (".intermediate.dense.", ".mlp.fc1."),
        (".output.dense.", ".mlp.fc2."),
    ),
}
_PREFIXES = {  # of the encoder: published, transformers 4, transformers 5
    "dinov2": ("encoder.encoder.", "encoder.", "encoder."),
    "siglip2": ("encoder.model.", "encoder.vision_model.", "encoder."),
    "mae": ("encoder.model.", "encoder.", "encoder."),
}


def diffusers_name(name: str, encoder_type: str, version: int) -> str:
    """Return diffusers' key for a published key.

    Args:
        name: published key, ``encoder.…`` or ``decoder.…``.
        encoder_type: key of ``ENCODER_TYPES``.
        version: major version of transformers.
    """
    if name.startswith("decoder."):
        return _replace_all(name, _DECODER)
    published, *prefixes = _PREFIXES[encoder_type]
    prefix = prefixes[TRANSFORMERS_VERSIONS.index(version)]
    key = prefix + name.removeprefix(published)
    return _replace_all(key, _ENCODER_5[encoder_type]) if version == 5 else key


def to_published_keys(
    tensors: Mapping[str, Tensor], keys: Iterable[str], encoder_type: str, source: str
) -> dict[str, Tensor]:
    """Rename the tensors of a diffusers folder to the published keys.

    Args:
        tensors: diffusers' state dict, with the keys of any supported transformers version.
        keys: the published keys of such an autoencoder; the decoder's positions are skipped.
        encoder_type: key of ``ENCODER_TYPES``.
        source: the folder, for error messages.

    Raises:
        UserError: keys are missing or unexpected; the message names them.
    """
    remaining = dict(tensors)
    for name in (*DIFFUSERS_ONLY, POSITIONS):
        remaining.pop(name, None)
    state, missing = {}, []
    for name in keys:
        if name == POSITIONS:
            continue
        candidates = [diffusers_name(name, encoder_type, v) for v in TRANSFORMERS_VERSIONS]
        found = next((candidate for candidate in candidates if candidate in remaining), None)
        if found is None:
            missing.append(candidates[0])
        else:
            state[name] = remaining.pop(found)
    if missing or remaining:
        faults = [f"missing {join_names(missing)}"] if missing else []
        faults += [f"unexpected {join_names(list(remaining))}"] if remaining else []
        raise UserError(f"{source} does not fit AutoencoderRAE: {'; '.join(faults)}")
    return state


def _replace_all(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for published, replacement in rules:
        name = name.replace(published, replacement)
    return name
