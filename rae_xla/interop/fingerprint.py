"""Which weights are these: SHA-256 of tensors, whatever file they lie in.

The fingerprint of a state dict is the SHA-256 of, for each tensor in the order of their names: the
name, a zero byte, the shape as Python writes it, a zero byte, and the SHA-256 of the values as
little-endian float32 (whole numbers as int64). So a ``.pt``, a safetensors file and a diffusers
folder of the same weights have the same fingerprint; a copy in bfloat16 has another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rae_xla.models.rae import RAE

ENCODER, DECODER, STATISTICS, DIT = "encoder", "decoder", "statistics", "dit"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors in canonical form, 64 hexadecimal digits."""
    names = sorted(tensors)
    whole = hashlib.sha256()
    with ThreadPoolExecutor(4, "fingerprint") as pool:
        for name, digest in zip(names, pool.map(lambda n: _digest(tensors[n]), names), strict=True):
            whole.update(f"{name}\0{tuple(tensors[name].shape)}\0".encode())
            whole.update(digest)
    return whole.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    kind = torch.float32 if tensor.is_floating_point() else torch.int64
    values = tensor.detach().to("cpu", kind).contiguous().numpy()
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False)).digest()


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    start = prefix + "."
    return {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}


def of_statistics(mean: Tensor | None, std: Tensor) -> str:
    """Fingerprint of what latents are normalised with; no mean is a mean of zero."""
    return fingerprint({"mean": torch.zeros_like(std) if mean is None else mean, "std": std})


def of_rae(rae: RAE) -> dict[str, str]:
    """Fingerprints of an autoencoder's encoder, decoder and, if it has them, statistics."""
    found = {
        ENCODER: fingerprint(rae.encoder.state_dict()),
        DECODER: fingerprint(rae.decoder.state_dict()),
    }
    if rae.latent_std is not None:
        found[STATISTICS] = of_statistics(rae.latent_mean, rae.latent_std)
    return found
