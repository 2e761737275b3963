"""The decoder alone, as ``pretrained_decoder_path`` and the published tools read it."""

from __future__ import annotations

from pathlib import Path

import torch

from rae_xla.errors import UserError
from rae_xla.interop import fingerprint as prints
from rae_xla.interop.belonging import manifest_of_state, write_beside
from rae_xla.interop.checkpoint_tensors import open_weights
from rae_xla.models.weights import write_torch_file

PREFIX = "decoder."


def export_decoder(checkpoint: str | Path, out: Path, weights: str = "ema") -> int:
    """Take the decoder out of a stage-1 checkpoint (ours or the reference's).

    Args:
        checkpoint: a training checkpoint (see ``open_weights``), or a whole RAE's state dict.
        out: where the bare state dict goes (torch file); its manifest goes beside it.
        weights: ``ema`` or ``model``.

    Returns:
        The number of parameters written.

    Raises:
        UserError: when the checkpoint holds no such weights or no decoder.
    """
    content = open_weights(checkpoint)
    if "model" in content and "step" in content:
        if weights not in content:
            raise UserError(f"{checkpoint} has no {weights!r} weights")
        content = content[weights]
    state = {
        name.removeprefix(PREFIX): tensor.contiguous()
        for name, tensor in content.items()
        if name.startswith(PREFIX) and isinstance(tensor, torch.Tensor)
    }
    if not state:
        raise UserError(f"{checkpoint} holds no decoder: none of its names starts with {PREFIX!r}")
    write_torch_file(state, out)
    whole = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    write_beside(out, manifest_of_state(whole, str(checkpoint)).only(prints.DECODER))
    return sum(tensor.numel() for tensor in state.values())
