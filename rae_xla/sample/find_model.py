"""What a user calls a model: a published name, a YAML file, a run's results, a saved folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from rae_xla.data.class_names import recorded_class_names
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_tensors import find_weights
from rae_xla.interop.dit_settings import CLASSES
from rae_xla.interop.hub import local_folder
from rae_xla.interop.pretrained import read_config
from rae_xla.interop.published import AUTOENCODERS, GENERATORS, fetch, nearest, published_config
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.rae import RAE
from rae_xla.sample.generate import ImageSampler, load_sampler

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.runtime import Runtime

RAE_FOLDER = "rae"
"""Where a saved diffusion transformer's folder may have its autoencoder's."""

_WEIGHTS = ["*.json", "*.safetensors", "*.bin"]


@dataclass(frozen=True)
class Found:
    """A model that is there.

    Attributes:
        config: how it is sampled, and which weights it has.
        saved: the folder or hub id that ``save_pretrained`` wrote; None where ``config`` names the
            weights.
        rae: the autoencoder of ``saved``.
        class_names: by label, of the data it was trained on, where they are known.
    """

    config: RunConfig
    saved: str | None = None
    rae: str | None = None
    class_names: tuple[str, ...] | None = None

    def load(self, runtime: Runtime) -> ImageSampler:
        """Build it from files that are here (``with_files``) and place it on the devices.

        Raises:
            UserError: files are missing, or do not belong together.
        """
        if self.saved is None:
            return load_sampler(self.config, runtime)
        assert self.config.stage_2 is not None
        rae = RAE.from_pretrained(self.rae or Path(self.saved, RAE_FOLDER))
        cls: Any = CLASSES[self.config.stage_2.target]
        model = cls.from_pretrained(self.saved, rae=rae)
        for module in (rae, model):
            runtime.place(module.requires_grad_(False))
        return ImageSampler(self.config, runtime, rae, model)


def find_model(
    model: str | Path, overrides: Sequence[str] = (), rae: str | Path | None = None
) -> Found:
    """Find a model by what a user calls it; only of a hub repository anything is downloaded.

    Args:
        model: a name of ``published.GENERATORS``; a YAML file; a results folder of stage 2, whose
            newest checkpoint is meant; a folder or hub id of a saved diffusion transformer.
        overrides: settings, ``key=value``.
        rae: the autoencoder of a saved diffusion transformer: a folder, a hub id, or a name of
            ``published.AUTOENCODERS``; default: the folder ``rae`` in its own.

    Raises:
        UserError: nothing is called so, or what is cannot be sampled.
    """
    from rae_xla.config import load_config

    path = Path(model).expanduser()
    here = path.exists()
    if (path / "config.json").is_file() or (not here and _on_the_hub(model)):
        return _saved(model, overrides, rae)
    if rae is not None:
        raise UserError(
            f"{model} names its autoencoder itself; another one goes with a folder that "
            "save_pretrained wrote"
        )
    if not here and str(model) in GENERATORS:
        return Found(published_config(str(model), overrides))
    if path.is_file():
        return Found(load_config(path, overrides))
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"there is no model {model}: give a published name, a YAML file, a results folder, or "
            f"what save_pretrained wrote; {nearest(str(model), list(GENERATORS))}"
        )
    # what the run was started from may stand in its configuration; what it has trained is drawn
    if load_config(path / "config.yaml").stage_2 is None:
        raise UserError(f"{path} is a run of stage 1, a decoder's: give one of stage 2")
    trained = f"stage_2.ckpt={find_weights(path, '--model')}"
    config = load_config(path / "config.yaml", [trained, *overrides])
    return Found(config, class_names=recorded_class_names(path))


def with_files(found: Found) -> Found:
    """The same with every file it needs downloaded.

    Raises:
        UserError: something could not be had from the hub.
    """
    if found.saved is None:
        return replace(found, config=fetch(found.config))
    return replace(found, saved=str(local_folder(found.saved, _WEIGHTS)))


def _on_the_hub(model: str | Path) -> bool:
    name = str(model)
    return is_hub_id(name) and not name.endswith((".yaml", ".yml"))


def _saved(model: str | Path, overrides: Sequence[str], rae: str | Path | None) -> Found:
    """A diffusion transformer's folder says how it is built; the rest are defaults."""
    from rae_xla.config import load_config

    folder = local_folder(model, ["config.json", f"{RAE_FOLDER}/config.json"])
    values = read_config(folder)
    kind = values.get("model")
    if kind not in CLASSES:
        what = values.get("_class_name") or kind or "another model"
        raise UserError(f"{model} holds {what}, not a diffusion transformer (DiTDH, LightningDiT)")
    if rae is None and not (folder / RAE_FOLDER / "config.json").is_file():
        raise UserError(
            f"{model} is a diffusion transformer alone: name its autoencoder with --rae (a folder, "
            f"a hub id, or one of {', '.join(AUTOENCODERS)})"
        )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "config.yaml"
        tree = {"stage_2": {"target": kind, "params": cast("dict[str, Any]", values["settings"])}}
        if "time_dist_shift_base" in values:
            tree["misc"] = {"time_dist_shift_base": values["time_dist_shift_base"]}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        config = load_config(path, overrides)
    if config.guidance.method != "cfg":
        raise UserError(
            "a saved diffusion transformer is guided by its null label (guidance.method=cfg); for "
            "a guide, give a YAML file with a guidance_model"
        )
    return Found(config, str(model), None if rae is None else str(rae))
