"""What the diffusion transformers share: they are loaded from a folder and saved to one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

_Transformer = TypeVar("_Transformer", bound="PretrainedTransformer")


class PretrainedTransformer(nn.Module):
    """A diffusion transformer with ``from_pretrained`` and ``save_pretrained``."""

    @classmethod
    def from_pretrained(cls: type[_Transformer], name: str | Path, **options: Any) -> _Transformer:
        """Load a folder that ``save_pretrained`` wrote, a checkpoint, or a published model.

        Args:
            name: a folder, a file, a hub id, or a published name such as ``ditdh-xl-256``.
            **options: see ``rae_xla.interop.pretrained.load_dit``.

        Raises:
            UserError: there is nothing of the kind, or it belongs to another autoencoder.
        """
        from rae_xla.interop.pretrained import load_dit

        return load_dit(cls, name, **options)

    def save_pretrained(self, folder: str | Path, rae: nn.Module | None = None) -> None:
        """Write a folder for ``from_pretrained``: config.json, model.safetensors, manifest.json.

        Args:
            folder: where to; it must not be there yet.
            rae: the autoencoder it was trained with, which the manifest then ties it to.

        Raises:
            UserError: it is there already, or cannot be written.
        """
        from rae_xla.interop.pretrained import save_dit

        save_dit(self, folder, rae)
