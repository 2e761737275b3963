"""``from_pretrained`` and ``save_pretrained`` of RAE, DiTDH and LightningDiT.

The interface is that of diffusers and transformers. huggingface_hub's ``ModelHubMixin`` is not
used: it neither verifies checksums nor writes a folder atomically, and it wraps ``__init__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.pretrained import published
from rae_xla.models.pretrained.components import AutoencoderBase, build_rae, rae_to_components
from rae_xla.models.pretrained.dit_settings import infer_settings, recorded_settings
from rae_xla.models.pretrained.fingerprint import DIT, fingerprint
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.manifest import (
    Part,
    check_parts,
    check_rae_files,
    checks_enabled,
    dit_manifest,
    rae_manifest,
    rae_parts,
    read_weights_manifest,
    write_weights_manifest,
)
from rae_xla.models.pretrained.model_folder import (
    CONFIG,
    HUB_PATTERNS,
    build_transformer,
    new_folder,
    read_rae,
    read_transformer,
    write_rae,
    write_transformer,
)
from rae_xla.models.pretrained.weight_files import open_weights_source

_Autoencoder = TypeVar("_Autoencoder", bound="PretrainedAutoencoder")
_Transformer = TypeVar("_Transformer", bound="PretrainedTransformer")


class PretrainedAutoencoder(AutoencoderBase):
    """Base class of RAE: ``from_pretrained`` and ``save_pretrained``."""

    @classmethod
    def from_pretrained(
        cls: type[_Autoencoder],
        name: str | Path,
        *,
        as_diffusers: bool = False,
        check: bool = True,
    ) -> _Autoencoder:
        """Load an RAE in eval mode with float32 weights.

        Args:
            name: a folder that ``save_pretrained`` or diffusers wrote, the hub id of one, or a
                published name such as ``rae-dinov2-b-256`` (``rae-xla hub list``).
            as_diffusers: for a diffusers folder: compute exactly what diffusers computes
                (``docs/interop.md``).
            check: verify the weights against their manifest, if there is one.

        Raises:
            UserError: the model is not found, keys do not fit, or parts do not match.
        """
        is_path = Path(name).expanduser().exists()  # takes precedence over a published name
        if not is_path and str(name) in published.AUTOENCODERS:
            arguments = published.fetch_rae(published.AUTOENCODERS[str(name)].arguments())
            rae = cls(**arguments)
            if check:
                check_rae_files(rae, arguments)
            return rae.eval()
        repository = name if is_path else published.DIFFUSERS.get(str(name), name)
        folder = local_folder(repository, HUB_PATTERNS)
        rae = build_rae(cls, read_rae(folder, as_diffusers=as_diffusers), str(folder))
        manifest = read_weights_manifest(folder)
        if manifest is not None and checks_enabled(check) and not as_diffusers:
            check_parts(manifest, rae_parts(rae, str(name)), folder)
        return rae

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for ``from_pretrained``.

        It gets ``config.json``, ``model.safetensors``, ``latent_statistics.safetensors`` (if the
        RAE has statistics) and ``weights.manifest.json``.

        Raises:
            UserError: the folder already exists, or cannot be written.
        """
        with new_folder(folder) as unfinished:
            write_rae(rae_to_components(self), unfinished)
            manifest = rae_manifest(rae_parts(self, str(folder)), self.decoder_output)
            write_weights_manifest(unfinished, manifest)


class PretrainedTransformer(nn.Module):
    """Base class of the diffusion transformers: ``from_pretrained`` and ``save_pretrained``.

    Attributes:
        settings: the constructor arguments.
    """

    settings: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls: type[_Transformer],
        name: str | Path,
        *,
        weights: str = "ema",
        rae: AutoencoderBase | None = None,
        check: bool = True,
    ) -> _Transformer:
        """Load a diffusion transformer in eval mode with float32 weights.

        Args:
            name: a folder that ``save_pretrained`` wrote, the hub id of one, a training checkpoint
                or results folder, a ``.pt`` or ``.safetensors`` file of the published layout, or a
                published name such as ``ditdh-xl-256`` (``rae-xla hub list``).
            weights: ``ema`` or ``model``, for a training checkpoint.
            rae: the RAE it will be used with; compared with the one of its training.
            check: verify the weights and ``rae`` against the manifest, if there is one.

        Raises:
            UserError: the model is not found, keys do not fit, or ``rae`` does not match.
        """
        source, kind, settings, state = _find_transformer(name, weights)
        if kind != cls.__name__:
            raise UserError(f"{source} holds a {kind}: load it with {kind}.from_pretrained")
        model = build_transformer(cls, settings, state, source)
        manifest = read_weights_manifest(source) if checks_enabled(check) else None
        if manifest is not None:
            actual = {DIT: Part(fingerprint(model.state_dict()), str(name))}
            if rae is not None:
                actual |= rae_parts(rae, "given as rae")
            check_parts(manifest, actual, source)
        return model

    def save_pretrained(self, folder: str | Path, rae: AutoencoderBase | None = None) -> None:
        """Write a folder for ``from_pretrained``.

        It gets ``config.json``, ``model.safetensors`` and ``weights.manifest.json``.

        Args:
            folder: must not exist, or be empty.
            rae: the RAE it was trained with, recorded in the manifest.

        Raises:
            UserError: the folder already exists, or cannot be written.
        """
        state = self.state_dict()
        with new_folder(folder) as unfinished:
            write_transformer(type(self).__name__, self.settings, state, unfinished)
            write_weights_manifest(unfinished, dit_manifest(state, str(folder), rae))


def _find_transformer(
    name: str | Path, weights: str
) -> tuple[str, str, Mapping[str, Any], Mapping[str, Tensor]]:
    """Return the source of a transformer, its class name, its settings and its state dict."""
    path = Path(name).expanduser()
    settings: tuple[str, dict[str, Any]] | None = None
    if not path.exists() and str(name) in published.GENERATORS:
        section = published.GENERATORS[str(name)].stage_2()
        settings = recorded_settings(section["target"], section["params"])
        path = Path(published.fetch_files([section["ckpt"]]).get(section["ckpt"], section["ckpt"]))
    elif (path / CONFIG).is_file() or (not path.exists() and "://" not in str(name)):
        folder = local_folder(name, HUB_PATTERNS)
        return str(folder), *read_transformer(folder)
    source = path if settings is not None else name
    content = open_weights_source(source, part="stage2", weights=weights)
    recorded = (content.config or {}).get("stage_2")
    if settings is None and isinstance(recorded, Mapping):
        settings = recorded_settings(str(recorded["target"]), recorded.get("params"))
    kind, arguments = settings or infer_settings(content.state, str(name))
    return content.source, kind, arguments, content.state
