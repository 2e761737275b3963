"""Model folders: the layout that ``save_pretrained`` writes and ``from_pretrained`` reads.

A folder has ``config.json`` (model class and settings), ``model.safetensors`` (state dict with the
published keys), for an RAE with statistics ``latent_statistics.safetensors`` (``mean``, ``var``),
and ``weights.manifest.json`` (``rae_xla.models.pretrained.manifest``). Folders of diffusers'
``AutoencoderRAE`` are read as well.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.pretrained.components import RAEComponents, RAESettings, assign_float32
from rae_xla.models.pretrained.diffusers_folder import read_diffusers
from rae_xla.models.pretrained.dit_layouts import from_raev2
from rae_xla.models.pretrained.dit_settings import DIT_CLASSES
from rae_xla.models.pretrained.latent_statistics import read_latent_statistics
from rae_xla.models.pretrained.manifest import FOLDER_MANIFEST
from rae_xla.models.weights import write_safetensors

FORMAT = 1
CONFIG, WEIGHTS, STATISTICS = "config.json", "model.safetensors", "latent_statistics.safetensors"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin"]
"""The files of a hub repository that a model folder consists of."""

_Model = TypeVar("_Model", bound=nn.Module)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model folder, ours or diffusers'.

    Raises:
        UserError: there is none, or a newer version wrote it.
    """
    values = read_json(str(folder.absolute()), CONFIG)
    if values is None:
        raise UserError(
            f"{folder} has no config.json: give a folder that save_pretrained wrote (ours or "
            "diffusers'); `rae-xla convert` writes one from other files"
        )
    if "model" in values and values.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {values.get('format')}; this version reads format {FORMAT}: use "
            "the version of rae_xla that wrote it"
        )
    return values


def write_config(
    folder: Path, model: str, settings: Mapping[str, Any], shift_base: float | None = None
) -> None:
    """Write ``config.json`` of a model folder.

    Args:
        folder: exists.
        model: name of the class.
        settings: what the class is built from.
        shift_base: ``misc.time_dist_shift_base`` of a transformer's training, if known.
    """
    values: dict[str, Any] = {"model": model, "format": FORMAT, "settings": settings}
    if shift_base is not None:
        values["time_dist_shift_base"] = shift_base
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` when the block succeeds.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists: give another name, or remove it")
    unfinished = folder.with_name(folder.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}): give another folder, or free some space"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ----------------------------------------------------------------------------- autoencoders


def read_rae(folder: Path, *, as_diffusers: bool = False) -> RAEComponents:
    """Read an RAE from a folder of ours or of diffusers.

    Args:
        folder: a local folder.
        as_diffusers: see ``diffusers_folder.read_diffusers``.

    Raises:
        UserError: the folder holds something else, or keys do not fit.
    """
    values = read_config(folder)
    if values.get("_class_name") == "AutoencoderRAE":
        ours = (folder / FOLDER_MANIFEST).is_file()
        return read_diffusers(folder, as_diffusers=as_diffusers, second_eps_removed=ours)
    if values.get("model") != "RAE":
        raise UserError(f"{folder} holds {_describe(values)}, not an autoencoder")
    try:
        settings = RAESettings(**values["settings"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json is damaged ({error}): copy or write it again"
        ) from error
    components = RAEComponents(settings, read_weights(str(folder.absolute())), None, None)
    if (folder / STATISTICS).is_file():
        components = components.with_statistics(*read_latent_statistics(folder / STATISTICS))
    return components


def write_rae(components: RAEComponents, folder: Path) -> None:
    """Write configuration, weights and statistics of an RAE into an existing folder."""
    write_config(folder, "RAE", components.settings.to_dict())
    write_safetensors(components.state, folder / WEIGHTS)
    if components.latent_std is not None:
        write_safetensors(components.statistics(), folder / STATISTICS)


# ----------------------------------------------------------------------------- transformers


def read_transformer(folder: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read class name, settings and state dict of a diffusion transformer's folder.

    Raises:
        UserError: the folder holds something else, or cannot be read.
    """
    values = read_config(folder)
    if values.get("model") not in DIT_CLASSES.values():
        raise UserError(f"{folder} holds {_describe(values)}, not a diffusion transformer")
    state = from_raev2(read_weights(str(folder.absolute())))
    return values["model"], values["settings"], state


def write_transformer(
    kind: str,
    settings: Mapping[str, Any],
    state: Mapping[str, Tensor],
    folder: Path,
    shift_base: float | None = None,
) -> None:
    """Write a diffusion transformer into an existing folder; see ``write_config``."""
    write_config(folder, kind, settings, shift_base)
    write_safetensors(state, folder / WEIGHTS)


def build_transformer(
    cls: type[_Model], settings: Mapping[str, Any], state: Mapping[str, Tensor], source: str
) -> _Model:
    """Build a diffusion transformer in eval mode with float32 weights.

    Raises:
        UserError: settings or keys do not fit; ``source`` names them in the message.
    """
    try:
        with torch.device("meta"):
            model = cls(**settings)
    except TypeError as error:
        raise UserError(
            f"{source}: a {cls.__name__} cannot be built from its settings: {error}"
        ) from error
    assign_float32(model, state, source)
    return model.eval()


def _describe(values: Mapping[str, Any]) -> str:
    kind = values.get("model") or values.get("_class_name") or values.get("model_type")
    return f"a {kind}" if kind else "an unknown model"
