"""Folders of whole models: what ``from_pretrained`` reads and ``save_pretrained`` writes.

A folder of ours has ``config.json`` (how to build the model), ``model.safetensors`` (its state
dict, published keys), an autoencoder's ``latent_statistics.safetensors`` (``mean``, ``var``), and
``weights.manifest.json`` (``interop.manifest``).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rae_xla.config import ModelSpec, RunConfig
from rae_xla.errors import UserError
from rae_xla.interop import fingerprint as prints
from rae_xla.interop.assembly import (
    RAEContent,
    RAESettings,
    fill,
    put_together,
    take_apart,
    variance_of,
    with_statistics,
)
from rae_xla.interop.dit_settings import CLASSES, dit_settings, infer_settings
from rae_xla.interop.hub import local_folder
from rae_xla.interop.manifest import (
    FOLDER_MANIFEST,
    Manifest,
    Part,
    check_parts,
    checks_wanted,
    read_manifest,
)
from rae_xla.interop.published import AUTOENCODERS, DIFFUSERS, GENERATORS, fetch
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.rae import RAE, read_latent_statistics
from rae_xla.models.weights import write_safetensors

FORMAT = 1
WEIGHTS, STATISTICS = "model.safetensors", "latent_statistics.safetensors"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin"]
_Model = TypeVar("_Model", bound=nn.Module)


def load_rae(name: str | Path, *, as_diffusers: bool = False, check: bool = True) -> RAE:
    """Load an autoencoder, in eval mode.

    Args:
        name: a folder of ours or of diffusers, a hub id of one, or a published name
            (``rae_xla.interop.published.AUTOENCODERS`` and ``DIFFUSERS``).
        as_diffusers: of a diffusers folder: compute what diffusers computes; see
            ``interop.diffusers_folder``.
        check: compare the weights with the manifest, if there is one.

    Raises:
        UserError: there is nothing of the kind, keys do not fit, or parts are not those that
            belong together.
    """
    if (published := _published(str(name), "stage_1")) is not None:
        return cast("RAE", published).eval()
    folder = local_folder(DIFFUSERS.get(str(name), name), _HUB_PATTERNS)
    content = read_rae(folder, as_diffusers=as_diffusers)
    rae = put_together(content, str(folder))
    manifest = read_manifest(folder)
    if manifest is not None and checks_wanted(check) and not as_diffusers:
        check_parts(manifest, rae_parts(rae, str(name)), str(folder))
    return rae


def read_rae(folder: Path, *, as_diffusers: bool = False) -> RAEContent:
    """Read the content of a folder of ours or of diffusers.

    Raises:
        UserError: it is neither, or keys do not fit.
    """
    from rae_xla.interop.diffusers_folder import read_diffusers

    values = read_config(folder)
    if values.get("_class_name") == "AutoencoderRAE":
        ours = (folder / FOLDER_MANIFEST).is_file()
        return read_diffusers(folder, as_diffusers=as_diffusers, second_eps_taken_off=ours)
    if values.get("model") != "RAE":
        raise UserError(f"{folder} holds {_described(values)}, not an autoencoder")
    try:
        settings = RAESettings(**values["settings"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from error
    content = RAEContent(settings, read_weights(str(folder.absolute())), None, None)
    if (folder / STATISTICS).is_file():
        content = with_statistics(content, *read_latent_statistics(folder / STATISTICS))
    return content


def save_rae(rae: RAE, folder: str | Path) -> None:
    """Write an autoencoder's folder.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    with new_folder(folder) as unfinished:
        write_rae(take_apart(rae), unfinished)
        write_manifest(unfinished, rae_manifest(rae_parts(rae, str(folder))))


def write_rae(content: RAEContent, folder: Path) -> None:
    """Write configuration, weights and statistics into a folder that exists."""
    write_config(folder, "RAE", asdict(content.settings))
    write_safetensors(content.state, folder / WEIGHTS)
    if content.latent_std is not None:
        write_safetensors(statistics_of(content), folder / STATISTICS)


def statistics_of(content: RAEContent) -> dict[str, Tensor]:
    """``var`` and, if there is one, ``mean``, as the published statistics files have them."""
    assert content.latent_std is not None
    values = {"var": variance_of(content.latent_std)}
    return values if content.latent_mean is None else {"mean": content.latent_mean, **values}


def rae_parts(rae: RAE, name: str) -> dict[str, Part]:
    """An autoencoder's parts by their fingerprints."""
    return {kind: Part(sha256, name) for kind, sha256 in prints.of_rae(rae).items()}


def rae_manifest(parts: Mapping[str, Part]) -> Manifest:
    """The manifest of an autoencoder whose parts were made with each other."""
    encoder = {prints.ENCODER: parts[prints.ENCODER]}
    needs = {kind: encoder for kind in (prints.DECODER, prints.STATISTICS) if kind in parts}
    return Manifest(parts, needs)


def load_dit(
    cls: type[_Model],
    name: str | Path,
    *,
    weights: str = "ema",
    rae: RAE | None = None,
    check: bool = True,
) -> _Model:
    """Load a diffusion transformer, in eval mode.

    Args:
        cls: ``DiTDH`` or ``LightningDiT``.
        name: a folder of ours, a hub id of one, a training checkpoint or results folder, a ``.pt``
            or ``.safetensors`` of the published layout, or a published name
            (``rae_xla.interop.published.GENERATORS``).
        weights: of a training checkpoint: ``ema`` or ``model``.
        rae: the autoencoder it is to be used with, compared with that of its training.
        check: compare with the manifest, if there is one.

    Raises:
        UserError: there is nothing of the kind, keys do not fit, or it belongs to another
            autoencoder.
    """
    if (published := _published(str(name), "stage_2")) is not None:
        return _as(cls, published, str(name)).eval()
    place, kind, settings, state = _read_dit(name, weights)
    if CLASSES[kind] is not cls:
        raise UserError(f"{place} holds a {kind}: load it with {kind}.from_pretrained")
    model = build_dit(kind, settings, state, str(place))
    manifest = read_manifest(place) if checks_wanted(check) else None
    if manifest is not None:
        actual = {prints.DIT: Part(prints.fingerprint(model.state_dict()), str(name))}
        check_parts(manifest, actual | ({} if rae is None else rae_parts(rae, "given")), str(place))
    return _as(cls, model, str(place))


def build_dit(
    kind: str, settings: Mapping[str, Any], state: Mapping[str, Tensor], where: str
) -> nn.Module:
    """A diffusion transformer with these weights, in eval mode.

    Raises:
        UserError: naming the keys or settings that do not fit.
    """
    try:
        with torch.device("meta"):
            model = CLASSES[kind](**settings)
    except TypeError as error:
        raise UserError(f"{where}: a {kind} cannot be built from its settings: {error}") from error
    fill(model, state, where)
    return model.eval()


def save_dit(model: nn.Module, folder: str | Path, rae: nn.Module | None = None) -> None:
    """Write a diffusion transformer's folder, tied to the autoencoder it was trained with.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    kind = type(model).__name__
    with new_folder(folder) as unfinished:
        settings = cast("dict[str, Any]", model.settings)
        write_config(unfinished, kind, settings)
        write_safetensors(model.state_dict(), unfinished / WEIGHTS)
        write_manifest(unfinished, dit_manifest(model.state_dict(), str(folder), rae))


def dit_manifest(state: Mapping[str, Tensor], name: str, rae: nn.Module | None) -> Manifest:
    """The manifest of a diffusion transformer; tied to encoder and statistics if ``rae`` is."""
    made_with = {} if rae is None else rae_parts(cast("RAE", rae), "its training's autoencoder")
    made_with.pop(prints.DECODER, None)  # any decoder of that encoder shows its latents
    parts = {prints.DIT: Part(prints.fingerprint(state), name)}
    return Manifest(parts, {prints.DIT: made_with} if made_with else {})


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder of ours or of diffusers.

    Raises:
        UserError: there is none, or it is of a newer format.
    """
    values = read_json(str(folder.absolute()), "config.json")
    if values is None:
        raise UserError(
            f"{folder} has no config.json: give a folder that save_pretrained wrote (ours or "
            "diffusers'); `rae-xla convert` makes one from other files"
        )
    if "model" in values and values.get("format") != FORMAT:
        raise UserError(
            f"{folder} is of format {values.get('format')}; this version reads {FORMAT}"
        )
    return values


def write_config(
    folder: Path, model: str, settings: Mapping[str, Any], shift_base: float | None = None
) -> None:
    """Write ``config.json`` of a folder of ours; with the base of the time shift it was trained
    with, where that is known.
    """
    values: dict[str, Any] = {"model": model, "format": FORMAT, "settings": settings}
    if shift_base is not None:
        values["time_dist_shift_base"] = shift_base
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder."""
    (folder / FOLDER_MANIFEST).write_text(manifest.to_json())


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block has ended well.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    folder = Path(folder).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give another name, or remove it")
    unfinished = folder.with_name(folder.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_dit(
    name: str | Path, weights: str
) -> tuple[Path, str, Mapping[str, Any], Mapping[str, Tensor]]:
    """Where it lies, the class's name, its settings and its state dict."""
    from rae_xla.interop.source import open_source

    path = Path(name).expanduser()
    if not path.exists() or (path / "config.json").is_file():
        path = local_folder(name, _HUB_PATTERNS)
        values = read_config(path)
        if values.get("model") not in CLASSES:
            raise UserError(f"{path} holds {_described(values)}, not a diffusion transformer")
        return path, values["model"], values["settings"], read_weights(str(path.absolute()))
    source = open_source(name, part="stage2", weights=weights)
    said = (source.config or {}).get("stage_2")
    known = None
    if isinstance(said, Mapping):
        known = dit_settings(ModelSpec(said["target"], dict(said.get("params") or {})))
    kind, settings = known or infer_settings(source.state, str(name))
    return Path(source.where), kind, settings, source.state


def _published(name: str, section: str) -> nn.Module | None:
    """A published model by its short name; None if there is no such name."""
    from rae_xla.registry import instantiate

    if Path(name).exists():
        return None
    if section == "stage_1" and name in AUTOENCODERS:
        spec = fetch(RunConfig(stage_1=ModelSpec(**AUTOENCODERS[name].section()))).stage_1
    elif section == "stage_2" and name in GENERATORS:
        generator = GENERATORS[name]
        found = generator.denoiser.section(AUTOENCODERS[generator.autoencoder].grid)
        spec = fetch(RunConfig(stage_2=ModelSpec(**found))).stage_2
    else:
        return None
    assert spec is not None
    return instantiate(spec)


def _as(cls: type[_Model], model: nn.Module, where: str) -> _Model:
    if not isinstance(model, cls):
        raise UserError(f"{where} is a {type(model).__name__}, not a {cls.__name__}")
    return model


def _described(values: Mapping[str, Any]) -> str:
    kind = values.get("model") or values.get("_class_name") or values.get("model_type")
    return f"a {kind}" if kind else "a model of another kind"
