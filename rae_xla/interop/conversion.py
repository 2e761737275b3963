"""Weights from any layout that is known here to any other; see ``docs/interop.md``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.interop import fingerprint as prints
from rae_xla.interop.assembly import RAEContent, put_together, take_apart, with_statistics
from rae_xla.interop.belonging import manifest_of_state, write_beside
from rae_xla.interop.dit_settings import CLASSES, dit_settings, infer_settings
from rae_xla.interop.hub import local_folder
from rae_xla.interop.manifest import Manifest, check_parts, checks_wanted, read_manifest
from rae_xla.interop.pretrained import (
    build_dit,
    dit_manifest,
    load_dit,
    load_rae,
    new_folder,
    rae_manifest,
    rae_parts,
    read_config,
    read_rae,
    statistics_of,
    write_config,
    write_manifest,
    write_rae,
)
from rae_xla.interop.published import AUTOENCODERS, DIFFUSERS, GENERATORS, fetch
from rae_xla.interop.source import Source, open_source
from rae_xla.models.dit_dh import DiTDH
from rae_xla.models.hf_folder import is_hub_id, read_weights
from rae_xla.models.rae import RAE, read_latent_statistics
from rae_xla.models.weights import load_strict, write_safetensors, write_torch_file

if TYPE_CHECKING:
    from rae_xla.config import ModelSpec

LAYOUTS = ("published", "safetensors", "diffusers", "pretrained")


@dataclass(frozen=True)
class Opened:
    """A source of weights, read.

    Attributes:
        part: one of ``source.PARTS``.
        about: what it is, in words.
        state: its tensors; of an autoencoder see ``content``.
        content: an autoencoder that can be built.
        dit: class name and arguments of a diffusion transformer.
        manifest: what belongs together, as far as it is known.
        notes: what the user should know about it.
        shift_base: of a diffusion transformer, its training's misc.time_dist_shift_base; None:
            unknown.
    """

    part: str
    about: str
    state: Mapping[str, Tensor]
    content: RAEContent | None = None
    dit: tuple[str, Mapping[str, Any]] | None = None
    manifest: Manifest = field(default_factory=Manifest)
    notes: tuple[str, ...] = ()
    shift_base: float | None = None


def open_any(
    source: str | Path,
    *,
    part: str | None = None,
    weights: str = "ema",
    config: str | None = None,
    statistics: Path | None = None,
    as_diffusers: bool = False,
    check: bool = True,
) -> Opened:
    """Read weights from whatever ``source`` is.

    Args:
        source: a ``.pt`` or ``.safetensors`` file, a checkpoint or results folder, a folder of ours
            or of diffusers, a hub id of one, a published name, or a run's YAML.
        part: see ``source.PARTS``; None: all that is there.
        weights: of a training checkpoint: ``ema`` or ``model``.
        config: the run's YAML, for what a checkpoint does not say itself.
        statistics: statistics file an autoencoder gets.
        as_diffusers: see ``diffusers_folder.read_diffusers``.
        check: compare with the manifest, if there is one.

    Raises:
        UserError: it cannot be read, or is nothing of the kind.
    """
    path = Path(source).expanduser()
    if not path.exists() and str(source) in {*AUTOENCODERS, *DIFFUSERS, *GENERATORS}:
        opened = _from_name(str(source))
    elif path.suffix in (".yaml", ".yml"):
        opened = _from_yaml(path, part)
    elif (path / "config.json").is_file() or (not path.exists() and is_hub_id(str(source))):
        folder = local_folder(source, ["*.json", "*.safetensors", "*.bin"])
        opened = _from_folder(folder, as_diffusers, check)
    else:
        opened = _from_weights(source, part, weights, config)
    if statistics is not None:
        if opened.content is None:
            raise UserError("statistics are given to a whole autoencoder: this is " + opened.about)
        content = with_statistics(opened.content, *read_latent_statistics(statistics))
        opened = _rae(put_together(content, str(source)), opened.about, str(source), opened.notes)
        if checks_wanted(check) and (manifest := read_manifest(statistics)) is not None:
            check_parts(manifest, opened.manifest.parts, statistics)
    return _only(opened, part)


def _from_name(name: str) -> Opened:
    from rae_xla.config import ModelSpec, RunConfig

    if name not in GENERATORS:
        return _rae(load_rae(name), "a published autoencoder", name)
    model = load_dit(DiTDH, name)
    section = AUTOENCODERS[GENERATORS[name].autoencoder].section()
    manifest, note = _tied(
        model.state_dict(), name, fetch(RunConfig(stage_1=ModelSpec(**section))).stage_1
    )
    about, settings = "a published DiTDH", ("DiTDH", model.settings)
    return Opened("stage2", about, model.state_dict(), None, settings, manifest, note)


def _from_yaml(path: Path, part: str | None) -> Opened:
    from rae_xla.config import load_config
    from rae_xla.registry import instantiate

    config = load_config(str(path))
    if part == "stage2" or (part is None and config.stage_1 is None):
        if config.stage_2 is None:
            raise UserError(f"{path} has no stage_2 section")
        model: Any = instantiate(config.stage_2)
        kind = type(model).__name__
        manifest, note = _tied(model.state_dict(), str(path), config.stage_1)
        about = f"the {kind} of a run's YAML"
        return Opened(
            "stage2", about, model.state_dict(), None, (kind, model.settings), manifest, note
        )
    if config.stage_1 is None:
        raise UserError(f"{path} has no stage_1 section")
    rae = cast("RAE", instantiate(config.stage_1)).eval()
    return _rae(rae, "the autoencoder of a run's YAML", str(path))


def _from_folder(folder: Path, as_diffusers: bool, check: bool) -> Opened:
    values = read_config(folder)
    manifest = read_manifest(folder) if checks_wanted(check) and not as_diffusers else None
    if values.get("model") in CLASSES:
        kind, settings = values["model"], values["settings"]
        state = build_dit(
            kind, settings, read_weights(str(folder.absolute())), str(folder)
        ).state_dict()
        found = dit_manifest(state, str(folder), None)
        if manifest is not None:
            check_parts(manifest, found.parts, folder)
            found = replace(found, made_with=manifest.made_with)
        base = values.get("time_dist_shift_base")
        about = f"a folder of a {kind}"
        return Opened("stage2", about, state, None, (kind, settings), found, shift_base=base)
    rae = put_together(read_rae(folder, as_diffusers=as_diffusers), str(folder))
    kind = "diffusers" if values.get("_class_name") == "AutoencoderRAE" else "ours"
    opened = _rae(rae, f"an autoencoder's folder, {kind}", str(folder))
    if manifest is not None:
        check_parts(manifest, opened.manifest.parts, folder)
    return opened


def _from_weights(source: str | Path, part: str | None, weights: str, config: str | None) -> Opened:
    found = open_source(source, None if part in ("rae", "decoder", "stats") else part, weights)
    stage_1, stage_2, base = _run_of(found, config)
    name = found.where
    if found.part == "stage2":
        known = None if stage_2 is None else dit_settings(stage_2)
        kind, settings = known or infer_settings(found.state, name)
        build_dit(kind, settings, found.state, name)  # strict
        manifest, note = _tied(found.state, name, stage_1)
        dit = (kind, settings)
        return Opened("stage2", found.about, found.state, None, dit, manifest, note, base)
    if found.part == "rae" and part != "decoder" and stage_1 is not None:
        return _rae(_rae_of_run(found.state, stage_1, name), found.about, name)
    manifest = manifest_of_state(found.state, name) if found.part == "rae" else Manifest()
    return Opened(found.part, found.about, found.state, manifest=manifest)


def _run_of(
    found: Source, config: str | None
) -> tuple[ModelSpec | None, ModelSpec | None, float | None]:
    """The two models of a run and the base of its time shift: of the YAML that is given, else of
    the checkpoint itself.
    """
    from rae_xla.config import ModelSpec, load_config

    if config is not None:
        given = load_config(config)
        return given.stage_1, given.stage_2, given.misc.time_dist_shift_base
    sections = [(found.config or {}).get(name) for name in ("stage_1", "stage_2")]
    specs = [
        ModelSpec(s["target"], dict(s.get("params") or {}), s.get("ckpt"))
        if isinstance(s, Mapping)
        else None
        for s in sections
    ]
    misc = (found.config or {}).get("misc")
    base = misc.get("time_dist_shift_base") if isinstance(misc, Mapping) else None
    return specs[0], specs[1], base


def _rae_of_run(state: Mapping[str, Tensor], spec: ModelSpec, where: str) -> RAE:
    """The autoencoder of a training run, with the weights of its checkpoint."""
    from rae_xla.registry import instantiate

    params = {**spec.params, "pretrained_decoder_path": None}
    rae = cast("RAE", instantiate(replace(spec, params=params, ckpt=None)))
    load_strict(rae, state, where)
    return rae.eval()


def _rae(rae: RAE, about: str, where: str, notes: tuple[str, ...] = ()) -> Opened:
    manifest = rae_manifest(rae_parts(rae, where))
    content = take_apart(rae)
    return Opened("rae", about, content.state, content, None, manifest, notes)


def _tied(
    state: Mapping[str, Tensor], where: str, stage_1: ModelSpec | None
) -> tuple[Manifest, tuple[str, ...]]:
    """A diffusion transformer's manifest, tied to its run's autoencoder if that can be had."""
    from rae_xla.registry import instantiate

    if stage_1 is None:
        note = "its autoencoder is unknown (--config names it): the manifest ties it to none"
        return dit_manifest(state, where, None), (note,)
    try:
        return dit_manifest(state, where, instantiate(stage_1)), ()
    except UserError as error:
        note = f"the autoencoder of its run cannot be had, so the manifest ties it to none: {error}"
        return dit_manifest(state, where, None), (note,)


def _only(opened: Opened, part: str | None) -> Opened:
    """One part of an autoencoder, or all."""
    if part in (None, opened.part):
        return opened
    if opened.part != "rae" or part not in ("decoder", "stats"):
        raise UserError(f"there is no part {part!r}: this is {opened.about}")
    kind = prints.DECODER if part == "decoder" else prints.STATISTICS
    state: Mapping[str, Tensor] = prints.under(opened.state, "decoder")
    if part == "stats":
        if opened.content is None or opened.content.latent_std is None:
            raise UserError(f"there are no latent statistics: this is {opened.about}")
        state = statistics_of(opened.content)
    return Opened(
        part, opened.about, state, manifest=opened.manifest.only(kind), notes=opened.notes
    )


def write_as(
    opened: Opened,
    layout: str,
    out: Path,
    *,
    transformers: int = 4,
    other_positions: bool = False,
) -> str:
    """Write weights in a layout; what was done, in words.

    Args:
        opened: what to write.
        layout: one of ``LAYOUTS``.
        out: the file, or the folder, which must not be there yet.
        transformers: see ``diffusers_folder.write_diffusers``; likewise ``other_positions``.

    Raises:
        UserError: the layout cannot hold it, or it cannot be written; nothing is left behind.
    """
    from rae_xla.interop.diffusers_folder import write_diffusers

    if layout == "diffusers":
        content = _whole(opened, "diffusers' layout")
        with new_folder(out) as folder:
            write_diffusers(
                content, folder, transformers=transformers, other_positions=other_positions
            )
            write_manifest(folder, opened.manifest)
        return f"an AutoencoderRAE for diffusers with transformers {transformers}"
    if layout == "pretrained":
        with new_folder(out) as folder:
            if opened.part == "stage2" and opened.dit is not None:
                kind, settings = opened.dit
                write_config(folder, kind, dict(settings), opened.shift_base)
                write_safetensors(opened.state, folder / "model.safetensors")
            else:
                kind = "RAE"
                write_rae(_whole(opened, "a folder for from_pretrained"), folder)
            write_manifest(folder, opened.manifest)
        return f"a folder for {kind}.from_pretrained"
    if layout == "published" and opened.part == "rae" and opened.content is not None:
        from rae_xla.interop.published_folder import write_published

        with new_folder(out) as folder:
            write_published(opened.content, opened.manifest, folder, out)
        return "encoder, decoder and statistics of the published layout, and a stage_1.yaml"
    return _write_file(opened, layout, out)


def _write_file(opened: Opened, layout: str, out: Path) -> str:
    if layout == "safetensors":
        if out.suffix != ".safetensors":
            raise UserError(f"--out {out}: a safetensors file must be named .safetensors")
        write_safetensors(opened.state, out)
    else:
        if out.suffix == ".safetensors":
            raise UserError(f"--out {out}: the published layout is a torch file, such as .pt")
        write_torch_file({k: v.contiguous() for k, v in opened.state.items()}, out)
    write_beside(out, opened.manifest)
    count = sum(tensor.numel() for tensor in opened.state.values())
    return f"{opened.part}, {len(opened.state)} tensors, {count:,} numbers"


def _whole(opened: Opened, layout: str) -> RAEContent:
    if opened.content is not None:
        return opened.content
    if opened.part == "rae":
        raise UserError(
            f"{layout} needs to know how the autoencoder is built, which is not in {opened.about}: "
            "give the run's YAML (--config)"
        )
    raise UserError(f"{layout} holds whole models, not {opened.about}")
