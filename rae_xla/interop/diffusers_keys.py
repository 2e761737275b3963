"""Names of an autoencoder's weights in diffusers' ``AutoencoderRAE`` and in the published layout.

The decoder's names are diffusers' own. The encoder's are those of the transformers release that
diffusers runs with: the six published repositories have those of transformers 4; transformers 5
renamed its layers, and diffusers loads a folder only under the names of the release beside it,
leaving what it does not find random.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.weights import listed

ENCODER_TYPES = {"dinov2": "Dinov2withNorm", "siglip2": "SigLIP2wNorm", "mae": "MAEwNorm"}
POSITIONS = "decoder.decoder_pos_embed"  # ours alone: diffusers computes its own
DIFFUSERS_ONLY = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
RELEASES = (4, 5)

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


def diffusers_name(name: str, encoder_type: str, release: int) -> str:
    """A published name (``encoder.…``, ``decoder.…``) in diffusers with a transformers release."""
    if name.startswith("decoder."):
        return _renamed(name, _DECODER)
    published, *prefixes = _PREFIXES[encoder_type]
    found = prefixes[RELEASES.index(release)] + name.removeprefix(published)
    return _renamed(found, _ENCODER_5[encoder_type]) if release == 5 else found


def published_state(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], encoder_type: str, where: str
) -> dict[str, Tensor]:
    """Rename a diffusers state dict, of either release; the decoder's positions are left out.

    Args:
        tensors: of a diffusers folder.
        expected: the published state dict of such an autoencoder (shapes matter not).
        encoder_type: diffusers' name of it.
        where: the folder, for errors.

    Raises:
        UserError: naming the keys that are missing or unexpected.
    """
    left = dict(tensors)
    for name in (*DIFFUSERS_ONLY, POSITIONS):
        left.pop(name, None)
    state, missing = {}, []
    for name in expected:
        if name == POSITIONS:
            continue
        candidates = [diffusers_name(name, encoder_type, release) for release in RELEASES]
        found = next((candidate for candidate in candidates if candidate in left), None)
        if found is None:
            missing.append(candidates[0])
        else:
            state[name] = left.pop(found)
    if missing or left:
        faults = [f"missing {listed(missing)}"] if missing else []
        faults += [f"unexpected {listed(list(left))}"] if left else []
        raise UserError(f"{where} does not fit AutoencoderRAE: {'; '.join(faults)}")
    return state


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for published, theirs in rules:
        name = name.replace(published, theirs)
    return name
