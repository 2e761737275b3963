"""Configurations of published models, and download of the published files a configuration names."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from rae_xla.config import RunConfig, load_config
from rae_xla.errors import UserError
from rae_xla.models.pretrained.published import (
    GENERATORS,
    RAE_FILES,
    fetch_encoders,
    fetch_files,
    replace_paths,
    suggest_name,
)
from rae_xla.moved import moved_names

__getattr__ = moved_names(
    __name__,
    {name: f"rae_xla.models.pretrained.published.{name}" for name in ("AUTOENCODERS", "DIFFUSERS")},
)


def published_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a published generator; downloads nothing.

    Raises:
        UserError: the name is unknown, or an override does not fit.
    """
    if name not in GENERATORS:
        raise UserError(
            f"{name} is not a published generator: {suggest_name(name, list(GENERATORS))}"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(GENERATORS[name].tree()), encoding="utf-8")
        try:
            return load_config(path, overrides)
        except UserError as error:  # the file is temporary
            raise UserError(str(error).replace(str(path), f"the published {name}")) from None


def fetch(config: RunConfig) -> RunConfig:
    """Download the published files and the encoder that a configuration names.

    Returns:
        The configuration with the paths of the downloaded files. Existing files are not downloaded;
        files that were never published are left alone, and loading them reports what is wrong.

    Raises:
        UserError: something cannot be downloaded.
    """
    guide = config.guidance.guidance_model
    rae = config.stage_1.params if config.stage_1 else {}
    weights = [model.ckpt for model in (config.stage_2, guide) if model is not None]
    paths = fetch_files([*(rae.get(key) for key in RAE_FILES), *weights]) | fetch_encoders(rae)
    if config.stage_1 is not None:
        stage_1 = replace(config.stage_1, params=replace_paths(rae, paths))
        config = replace(config, stage_1=stage_1)
    if config.stage_2 is not None and config.stage_2.ckpt in paths:
        stage_2 = replace(config.stage_2, ckpt=paths[config.stage_2.ckpt])
        config = replace(config, stage_2=stage_2)
    if guide is not None and guide.ckpt in paths:
        guide = replace(guide, ckpt=paths[guide.ckpt])
        config = replace(config, guidance=replace(config.guidance, guidance_model=guide))
    return config
