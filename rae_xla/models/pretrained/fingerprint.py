"""Fingerprints: the SHA-256 of weights, independent of the file format that stores them.

The fingerprint of a state dict is the SHA-256 of, for each tensor in the order of their names: the
name, a zero byte, the shape as Python prints it, a zero byte, and the SHA-256 of the values as
little-endian float32 (integers as int64). A ``.pt``, a safetensors file and a diffusers folder with
the same weights therefore have the same fingerprint; a bfloat16 copy has another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from rae_xla.models.pretrained.components import AutoencoderBase

ENCODER, DECODER, STATISTICS, DIT = "encoder", "decoder", "statistics", "dit"
"""The kinds of parts that a manifest names."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of a state dict, 64 hexadecimal digits."""
    names = sorted(tensors)
    total = hashlib.sha256()
    with ThreadPoolExecutor(4, "fingerprint") as pool:
        for name, digest in zip(names, pool.map(lambda n: _digest(tensors[n]), names), strict=True):
            total.update(f"{name}\0{tuple(tensors[name].shape)}\0".encode())
            total.update(digest)
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    dtype = torch.float32 if tensor.is_floating_point() else torch.int64
    values = tensor.detach().to("cpu", dtype).contiguous().numpy()
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<"), copy=False)).digest()


def of_statistics(mean: Tensor | None, std: Tensor) -> str:
    """Return the fingerprint of latent statistics; no mean counts as a mean of zero."""
    return fingerprint({"mean": torch.zeros_like(std) if mean is None else mean, "std": std})


def of_rae(rae: AutoencoderBase) -> dict[str, str]:
    """Return the fingerprints of an RAE's encoder, decoder and, if it has them, statistics."""
    prints = {
        ENCODER: fingerprint(rae.encoder.state_dict()),
        DECODER: fingerprint(rae.decoder.state_dict()),
    }
    if rae.latent_std is not None:
        prints[STATISTICS] = of_statistics(rae.latent_mean, rae.latent_std)
    return prints


def select_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix.``, with that prefix removed."""
    start = prefix + "."
    return {k[len(start) :]: v for k, v in state.items() if k.startswith(start)}
