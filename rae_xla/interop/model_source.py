"""Model sources: read weights in any known format, with their settings and provenance.

``rae-xla convert`` and ``rae-xla export`` write a source in another layout
(``rae_xla.interop.layouts``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from rae_xla.config import ModelSpec, RunConfig, load_config
from rae_xla.data.class_names import class_names_of_run, recorded_class_names
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.interop.published import fetch
from rae_xla.models.dit import LightningDiT
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.components import RAEComponents, build_rae, rae_to_components
from rae_xla.models.pretrained.dit_settings import infer_settings, recorded_settings
from rae_xla.models.pretrained.fingerprint import DECODER, STATISTICS, select_prefix
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.latent_statistics import read_latent_statistics
from rae_xla.models.pretrained.manifest import (
    Manifest,
    check_parts,
    checks_enabled,
    dit_manifest,
    rae_manifest,
    rae_parts,
    rae_state_manifest,
    read_weights_manifest,
)
from rae_xla.models.pretrained.model_folder import (
    CONFIG,
    HUB_PATTERNS,
    build_transformer,
    read_config,
    read_rae,
    read_transformer,
)
from rae_xla.models.pretrained.published import AUTOENCODERS, DIFFUSERS, GENERATORS
from rae_xla.models.pretrained.weight_files import open_weights_source
from rae_xla.models.rae import RAE
from rae_xla.models.weights import load_strict

TRANSFORMERS: dict[str, type[DiTDH] | type[LightningDiT]] = {
    "DiTDH": DiTDH,
    "LightningDiT": LightningDiT,
}
"""The diffusion transformers by class name."""


@dataclass(frozen=True)
class ModelSource:
    """Weights, and what is known about the model that they belong to.

    Attributes:
        part: one of ``weight_files.PARTS``.
        description: one line for people.
        state: tensors by their published names.
        components: settings and statistics of an autoencoder, if they are known.
        transformer: class name and constructor arguments of a diffusion transformer.
        manifest: the parts and those they were trained with, as far as known.
        notes: messages for the user.
        shift_base: ``misc.time_dist_shift_base`` of a transformer's training; None: unknown.
        class_names: of a transformer's classes by label, if a run recorded them.
    """

    part: str
    description: str
    state: Mapping[str, Tensor]
    components: RAEComponents | None = None
    transformer: tuple[str, Mapping[str, Any]] | None = None
    manifest: Manifest = field(default_factory=Manifest)
    notes: tuple[str, ...] = ()
    shift_base: float | None = None
    class_names: tuple[str, ...] | None = None


def open_model_source(
    name: str | Path,
    *,
    part: str | None = None,
    weights: str = "ema",
    config: str | None = None,
    statistics: Path | None = None,
    as_diffusers: bool = False,
    check: bool = True,
) -> ModelSource:
    """Read a model, or a part of one, from any known format.

    Args:
        name: a ``.pt`` or ``.safetensors`` file, a training checkpoint or results folder, a folder
            of ours or of diffusers, a hub id of one, a published name, or the YAML file of a run.
        part: one of ``weight_files.PARTS``; None: everything the source has.
        weights: ``ema`` or ``model``, for a training checkpoint.
        config: YAML file of the run, for a checkpoint that does not store its configuration.
        statistics: file of latent statistics to add to an autoencoder.
        as_diffusers: see ``diffusers_folder.read_diffusers``.
        check: verify manifests, if there are any.

    Raises:
        UserError: the source cannot be read or is of an unknown kind.
    """
    path = Path(name).expanduser()
    if not path.exists() and str(name) in {*AUTOENCODERS, *DIFFUSERS, *GENERATORS}:
        source = _from_published_name(str(name))
    elif path.suffix in (".yaml", ".yml"):
        source = _from_yaml(path, part)
    elif (path / CONFIG).is_file() or (not path.exists() and is_hub_id(str(name))):
        source = _from_model_folder(local_folder(name, HUB_PATTERNS), as_diffusers, check)
    else:
        source = _from_weights(name, part, weights, config)
    if statistics is not None:
        source = _with_statistics(source, statistics, str(name), check)
    return _select_part(source, part)


def _from_published_name(name: str) -> ModelSource:
    if name not in GENERATORS:
        return _autoencoder(RAE.from_pretrained(name), "a published autoencoder", name)
    model = DiTDH.from_pretrained(name)
    section = AUTOENCODERS[GENERATORS[name].autoencoder].section()
    stage_1 = fetch(RunConfig(stage_1=ModelSpec(**section))).stage_1
    return _transformer(model, "a published DiTDH", name, stage_1)


def _from_yaml(path: Path, part: str | None) -> ModelSource:
    config = load_config(str(path))
    if part == "stage2" or (part is None and config.stage_1 is None):
        if config.stage_2 is None:
            raise UserError(f"{path} has no stage_2 section: give the file of a stage-2 run")
        model = cast("DiTDH | LightningDiT", instantiate(config.stage_2))
        description = f"the {type(model).__name__} of a configuration"
        return _transformer(model, description, str(path), config.stage_1)
    if config.stage_1 is None:
        raise UserError(f"{path} has no stage_1 section: add it, or use --part stage2")
    rae = cast("RAE", instantiate(config.stage_1)).eval()
    return _autoencoder(rae, "the autoencoder of a configuration", str(path))


def _from_model_folder(folder: Path, as_diffusers: bool, check: bool) -> ModelSource:
    values = read_config(folder)
    manifest = None
    if checks_enabled(check) and not as_diffusers:
        manifest = read_weights_manifest(folder)
    if values.get("model") in TRANSFORMERS:
        kind, settings, stored = read_transformer(folder)
        state = build_transformer(TRANSFORMERS[kind], settings, stored, str(folder)).state_dict()
        actual = dit_manifest(state, str(folder))
        if manifest is not None:
            check_parts(manifest, actual.parts, folder)
            actual = replace(actual, made_with=manifest.made_with)
        return ModelSource(
            "stage2",
            f"a folder with a {kind}",
            state,
            transformer=(kind, settings),
            manifest=actual,
            shift_base=values.get("time_dist_shift_base"),
            class_names=recorded_class_names(folder),
        )
    rae = build_rae(RAE, read_rae(folder, as_diffusers=as_diffusers), str(folder))
    layout = "diffusers" if values.get("_class_name") == "AutoencoderRAE" else "our"
    source = _autoencoder(rae, f"a folder with an autoencoder in {layout} layout", str(folder))
    if manifest is not None:
        check_parts(manifest, source.manifest.parts, folder)
    return source


def _from_weights(
    name: str | Path, part: str | None, weights: str, config: str | None
) -> ModelSource:
    wanted = None if part in ("rae", "decoder", "stats") else part
    content = open_weights_source(name, wanted, weights)
    stage_1, stage_2, shift_base = _run_settings(content.config, config)
    if content.part == "stage2":
        recorded = stage_2 and recorded_settings(stage_2.target, stage_2.params)
        kind, settings = recorded or infer_settings(content.state, content.source)
        # strict
        build_transformer(TRANSFORMERS[kind], settings, content.state, content.source)
        manifest, notes = _transformer_manifest(content.state, content.source, stage_1)
        return ModelSource(
            "stage2",
            content.description,
            content.state,
            transformer=(kind, settings),
            manifest=manifest,
            notes=notes,
            shift_base=shift_base,
            class_names=class_names_of_run(content.source),
        )
    if content.part == "rae" and part != "decoder" and stage_1 is not None:
        rae = _rae_of_run(content.state, stage_1, content.source)
        return _autoencoder(rae, content.description, content.source)
    manifest = Manifest()
    if content.part == "rae":
        manifest = rae_state_manifest(content.state, content.source, content.config)
    return ModelSource(content.part, content.description, content.state, manifest=manifest)


def _run_settings(
    recorded: Mapping[str, Any] | None, config: str | None
) -> tuple[ModelSpec | None, ModelSpec | None, float | None]:
    """Return ``stage_1``, ``stage_2`` and ``misc.time_dist_shift_base`` of a run.

    Args:
        recorded: the configuration that a checkpoint stores, if any.
        config: YAML file, which takes precedence.
    """
    if config is not None:
        run = load_config(config)
        return run.stage_1, run.stage_2, run.misc.time_dist_shift_base
    sections = [(recorded or {}).get(name) for name in ("stage_1", "stage_2")]
    specs = [
        ModelSpec(s["target"], dict(s.get("params") or {}), s.get("ckpt"))
        if isinstance(s, Mapping)
        else None
        for s in sections
    ]
    misc = (recorded or {}).get("misc")
    shift_base = misc.get("time_dist_shift_base") if isinstance(misc, Mapping) else None
    return specs[0], specs[1], shift_base


def _rae_of_run(state: Mapping[str, Tensor], spec: ModelSpec, source: str) -> RAE:
    """Build the autoencoder of a training run with the weights of its checkpoint."""
    params = {**spec.params, "pretrained_decoder_path": None}
    rae = cast("RAE", instantiate(replace(spec, params=params, ckpt=None)))
    load_strict(rae, state, source)
    return rae.eval()


def _autoencoder(rae: RAE, description: str, name: str) -> ModelSource:
    components = rae_to_components(rae)
    manifest = rae_manifest(rae_parts(rae, name), rae.decoder_output)
    return ModelSource("rae", description, components.state, components, manifest=manifest)


def _transformer(
    model: DiTDH | LightningDiT, description: str, name: str, stage_1: ModelSpec | None
) -> ModelSource:
    state = model.state_dict()
    manifest, notes = _transformer_manifest(state, name, stage_1)
    return ModelSource(
        "stage2",
        description,
        state,
        transformer=(type(model).__name__, model.settings),
        manifest=manifest,
        notes=notes,
    )


def _transformer_manifest(
    state: Mapping[str, Tensor], name: str, stage_1: ModelSpec | None
) -> tuple[Manifest, tuple[str, ...]]:
    """Return a transformer's manifest, with its run's autoencoder if that can be loaded."""
    if stage_1 is None:
        note = "the manifest records no autoencoder: it is unknown (--config names it)"
        return dit_manifest(state, name), (note,)
    try:
        return dit_manifest(state, name, cast("RAE", instantiate(stage_1))), ()
    except UserError as error:
        note = f"the manifest records no autoencoder: that of the run cannot be loaded: {error}"
        return dit_manifest(state, name), (note,)


def _with_statistics(source: ModelSource, path: Path, name: str, check: bool) -> ModelSource:
    if source.components is None:
        raise UserError(f"statistics need a complete autoencoder; this is {source.description}")
    components = source.components.with_statistics(*read_latent_statistics(path))
    rae = build_rae(RAE, components, name)
    updated = replace(_autoencoder(rae, source.description, name), notes=source.notes)
    if checks_enabled(check) and (manifest := read_weights_manifest(path)) is not None:
        check_parts(manifest, updated.manifest.parts, path)
    return updated


def _select_part(source: ModelSource, part: str | None) -> ModelSource:
    """Return one part of an autoencoder, or the source itself."""
    if part in (None, source.part):
        return source
    if source.part != "rae" or part not in ("decoder", "stats"):
        raise UserError(f"there is no part {part!r} in {source.description}: omit --part")
    if part == "decoder":
        kind, state = DECODER, select_prefix(source.state, "decoder")
    elif source.components is None or source.components.latent_std is None:
        raise UserError(
            f"there are no latent statistics in {source.description}: give --stats FILE"
        )
    else:
        kind, state = STATISTICS, source.components.statistics()
    manifest = source.manifest.only(kind)
    return ModelSource(part, source.description, state, manifest=manifest, notes=source.notes)
