"""Model lookup: resolve a published name, YAML file, results folder or saved folder to a model."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from rae_xla import storage
from rae_xla.checkpoint.tensors import find_weights
from rae_xla.config.paths import PathRule, parse_path, path_setting
from rae_xla.data.class_names import (
    CLASSES_FILE,
    IMAGENET_CLASSES,
    class_names_of_run,
    fill_names,
    imagenet_names,
    recorded_class_names,
)
from rae_xla.errors import UserError
from rae_xla.interop.model_source import TRANSFORMERS
from rae_xla.interop.published import fetch, published_config
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.model_folder import read_config
from rae_xla.models.pretrained.published import AUTOENCODERS, GENERATORS, suggest_name
from rae_xla.models.rae import RAE
from rae_xla.sample.sampler import ImageSampler, load_sampler
from rae_xla.storage.staging import staged_input

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend

logger = logging.getLogger(__name__)

RAE_FOLDER = "rae"
"""Subfolder of a saved diffusion transformer that may hold its autoencoder."""

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
        own_data: the model is not a published one, so ImageNet's names are a guess.
    """

    config: RunConfig
    saved: str | None = None
    rae: str | None = None
    class_names: tuple[str, ...] | None = None
    own_data: bool = False

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
        model: a name in ``published.GENERATORS``; a YAML file; a results folder of stage 2, local
            or ``gs://``, whose newest checkpoint is used; or a folder or hub id of a saved
            diffusion transformer.
        overrides: settings, ``key=value``.
        rae: the autoencoder of a saved diffusion transformer: a folder, a hub id, or a name in
            ``published.AUTOENCODERS``; None for the subfolder ``rae``.

    Raises:
        UserError: if there is no such model, or it cannot generate images.
    """
    from rae_xla.config import load_config

    model = parse_path(model, "the model", PathRule(hub=True))
    path = Path(model)
    exists = storage.exists(model)
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
        config = load_config(path, overrides)
        ckpt = None if config.stage_2 is None else config.stage_2.ckpt
        if ckpt is None:
            return ResolvedModel(config)
        names = class_names_of_run(ckpt)
        return ResolvedModel(config, class_names=names, own_data=not _is_published(ckpt))
    if not storage.exists(storage.join(str(model), "config.yaml")):
        raise UserError(
            f"there is no model {model}: give a published name, a YAML file, a results folder, or "
            f"a folder that save_pretrained wrote; {suggest_name(str(model), list(GENERATORS))}"
        )
    return _resolve_run(str(model), overrides)


def _resolve_run(folder: str, overrides: Sequence[str]) -> ResolvedModel:
    """Resolve a results folder, local or ``gs://``."""
    from rae_xla.config import load_config

    with staged_input(storage.join(folder, "config.yaml")) as path:
        if load_config(path).stage_2 is None:
            raise UserError(
                f"{folder} is a stage-1 run, which trains a decoder: give a stage-2 run"
            )
        # The run's configuration may name weights it started from; use those it trained.
        trained = path_setting("stage_2.ckpt", find_weights(folder, "--model"))
        config = load_config(path, [trained, *overrides])
    return ResolvedModel(config, class_names=recorded_class_names(folder), own_data=True)


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

    They are those given; those of the data set that the model was trained on, if a run recorded
    them; ImageNet's for a model of 1,000 classes; or else the labels as text. A model may have more
    classes than its data set; the others get their labels as names.

    Raises:
        UserError: if the number of given names is not the number of classes.
    """
    count = model.config.misc.num_classes
    if given is None and model.class_names is not None:
        return fill_names(model.class_names, count)
    if given is None and count == IMAGENET_CLASSES:
        if model.own_data:
            logger.warning(
                "no class names are recorded for this model, so those of ImageNet are used: if it "
                "was trained on other classes, give --class-names FILE"
            )
        return imagenet_names()
    if given is None:
        return tuple(map(str, range(count)))
    if len(given) != count:
        raise UserError(
            f"{len(given)} class names were given, the model has {count} classes: name each once"
        )
    return tuple(given)


def _is_published(ckpt: str) -> bool:
    """Return whether a path ends with that of a published file of weights."""
    return any(ckpt.endswith(generator.denoiser.file) for generator in GENERATORS.values())


def _is_on_hub(model: str | Path) -> bool:
    name = str(model)
    return is_hub_id(name) and not name.endswith((".yaml", ".yml"))


def _resolve_saved(
    model: str | Path, overrides: Sequence[str], rae: str | Path | None
) -> ResolvedModel:
    """Build the configuration of a saved diffusion transformer; sampling settings are defaults."""
    from rae_xla.config import load_config

    folder = local_folder(model, ["config.json", f"{RAE_FOLDER}/config.json", CLASSES_FILE])
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
        try:
            config = load_config(path, overrides)
        except UserError as error:  # names the file that the user has
            raise UserError(str(error).replace(str(path), f"{model}/config.json")) from None
    if config.guidance.method != "cfg":
        raise UserError(
            "a saved diffusion transformer supports classifier-free guidance only "
            "(guidance.method=cfg); for autoguidance, give a YAML file with a guidance_model"
        )
    return ResolvedModel(
        config, str(model), None if rae is None else str(rae), recorded_class_names(folder)
    )
