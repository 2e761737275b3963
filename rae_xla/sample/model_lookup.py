"""Model lookup: resolve a published name, YAML file, results folder or saved folder to a model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from rae_xla.checkpoint.tensors import find_weights
from rae_xla.data.class_names import imagenet_names, recorded_class_names
from rae_xla.errors import UserError
from rae_xla.interop.model_source import TRANSFORMERS
from rae_xla.interop.published import fetch, published_config
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.model_folder import read_config
from rae_xla.models.pretrained.published import AUTOENCODERS, GENERATORS, suggest_name
from rae_xla.models.rae import RAE
from rae_xla.sample.sampler import ImageSampler, load_sampler

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend

RAE_FOLDER = "rae"
"""Subfolder of a saved diffusion transformer that may hold its autoencoder."""

IMAGENET_CLASSES = 1000

_WEIGHT_FILES = ["*.json", "*.safetensors", "*.bin"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model that a user named, before its weights are downloaded and loaded.

    Attributes:
        config: sampling settings, and the weight files unless ``saved`` is set.
        saved: folder or hub id that ``save_pretrained`` wrote; None if ``config`` names the
            weights.
        rae: folder, hub id or published name of the autoencoder of ``saved``; None for its
            subfolder ``rae``.
        class_names: class names by label, recorded by the run that trained the model; None if
            unknown.
    """

    config: RunConfig
    saved: str | None = None
    rae: str | None = None
    class_names: tuple[str, ...] | None = None

    def load(self, backend: Backend) -> ImageSampler:
        """Build the model and place it on the devices.

        All files must be local: call :func:`download_files` first.

        Raises:
            UserError: if files are missing or do not match each other.
        """
        if self.saved is None:
            return load_sampler(self.config, backend)
        assert self.config.stage_2 is not None
        rae = RAE.from_pretrained(self.rae or Path(self.saved, RAE_FOLDER))
        cls: Any = TRANSFORMERS[self.config.stage_2.target]
        model = cls.from_pretrained(self.saved, rae=rae)
        for module in (rae, model):
            backend.place(module.requires_grad_(False))
        return ImageSampler(self.config, backend, rae, model)


def resolve_model(
    model: str | Path, overrides: Sequence[str] = (), rae: str | Path | None = None
) -> ResolvedModel:
    """Resolve what a user gave as the model.

    Only the configuration of a hub repository is downloaded.

    Args:
        model: a name in ``published.GENERATORS``; a YAML file; a results folder of stage 2, whose
            newest checkpoint is used; or a folder or hub id of a saved diffusion transformer.
        overrides: settings, ``key=value``.
        rae: the autoencoder of a saved diffusion transformer: a folder, a hub id, or a name in
            ``published.AUTOENCODERS``; None for the subfolder ``rae``.

    Raises:
        UserError: if there is no such model, or it cannot generate images.
    """
    from rae_xla.config import load_config

    path = Path(model).expanduser()
    exists = path.exists()
    if (path / "config.json").is_file() or (not exists and _is_on_hub(model)):
        return _resolve_saved(model, overrides, rae)
    if rae is not None:
        raise UserError(
            f"{model} has its own autoencoder: --rae applies only to a folder or hub id that "
            "save_pretrained wrote"
        )
    if not exists and str(model) in GENERATORS:
        return ResolvedModel(published_config(str(model), overrides))
    if path.is_file():
        return ResolvedModel(load_config(path, overrides))
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"there is no model {model}: give a published name, a YAML file, a results folder, or "
            f"a folder that save_pretrained wrote; {suggest_name(str(model), list(GENERATORS))}"
        )
    # The run's configuration may name weights it started from; use those it trained.
    if load_config(path / "config.yaml").stage_2 is None:
        raise UserError(f"{path} is a stage-1 run, which trains a decoder: give a stage-2 run")
    trained = f"stage_2.ckpt={find_weights(path, '--model')}"
    config = load_config(path / "config.yaml", [trained, *overrides])
    return ResolvedModel(config, class_names=recorded_class_names(path))


def download_files(model: ResolvedModel) -> ResolvedModel:
    """Download every file that a model needs and return the model with local paths.

    Raises:
        UserError: if a file cannot be downloaded from the hub.
    """
    if model.saved is None:
        return replace(model, config=fetch(model.config))
    return replace(model, saved=str(local_folder(model.saved, _WEIGHT_FILES)))


def resolve_class_names(
    model: ResolvedModel, given: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return the names of a model's classes, by label.

    They are those given; ImageNet's for a model of 1,000 classes; those of the data set that the
    model was trained on; or else the labels as text.

    Raises:
        UserError: if the number of given names is not the number of classes.
    """
    count = model.config.misc.num_classes
    if given is None and count == IMAGENET_CLASSES:
        return imagenet_names()
    if given is None:
        own = model.class_names
        return own if own is not None and len(own) == count else tuple(map(str, range(count)))
    if len(given) != count:
        raise UserError(
            f"{len(given)} class names were given, the model has {count} classes: name each once"
        )
    return tuple(given)


def _is_on_hub(model: str | Path) -> bool:
    name = str(model)
    return is_hub_id(name) and not name.endswith((".yaml", ".yml"))


def _resolve_saved(
    model: str | Path, overrides: Sequence[str], rae: str | Path | None
) -> ResolvedModel:
    """Build the configuration of a saved diffusion transformer; sampling settings are defaults."""
    from rae_xla.config import load_config

    folder = local_folder(model, ["config.json", f"{RAE_FOLDER}/config.json"])
    values = read_config(folder)
    target = values.get("model")
    if target not in TRANSFORMERS:
        name = values.get("_class_name") or target or "another model"
        raise UserError(
            f"{model} contains {name}, not a diffusion transformer (DiTDH, LightningDiT)"
        )
    if rae is None and not (folder / RAE_FOLDER / "config.json").is_file():
        raise UserError(
            f"{model} contains a diffusion transformer without its autoencoder: give --rae (a "
            f"folder, a hub id, or one of {', '.join(AUTOENCODERS)})"
        )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        params = cast("dict[str, Any]", values["settings"])
        tree: dict[str, Any] = {"stage_2": {"target": target, "params": params}}
        if "time_dist_shift_base" in values:
            tree["misc"] = {"time_dist_shift_base": values["time_dist_shift_base"]}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        config = load_config(path, overrides)
    if config.guidance.method != "cfg":
        raise UserError(
            "a saved diffusion transformer supports classifier-free guidance only "
            "(guidance.method=cfg); for autoguidance, give a YAML file with a guidance_model"
        )
    return ResolvedModel(config, str(model), None if rae is None else str(rae))
