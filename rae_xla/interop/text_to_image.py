"""Text-to-image models from published folders and from training runs, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae_xla import storage
from rae_xla.checkpoint.manager import newest_checkpoint, read_checkpoint_manifest
from rae_xla.checkpoint.tensors import CheckpointContent
from rae_xla.config import RunConfig
from rae_xla.errors import UserError
from rae_xla.models.hf_folder import is_hub_id, read_json
from rae_xla.models.pretrained.hub import local_folder
from rae_xla.models.pretrained.published_text_to_image import MODEL_FILES, TEXT_TO_IMAGE
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.scale_rae import (
    from_published,
    infer_settings,
    language_model_config,
    load_scale_rae,
    save_scale_rae,
    untied,
)
from rae_xla.models.text_to_image.settings import HeadSettings, PromptReading, WideHead
from rae_xla.models.weights import load_strict
from rae_xla.transport.create import DATA_T_EPS
from rae_xla.transport.sized_flow import SizedFlow

_EMBEDDINGS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TextToImageSource:
    """A text-to-image model and what belongs to it.

    Attributes:
        model: in eval mode, on the CPU.
        config: of the run that it is from, as a dict; None for a published folder.
        name: where it is from, for messages and manifests.
    """

    model: TextToImageModel
    config: Mapping[str, Any] | None
    name: str


def load_text_to_image(source: str, part: str = "ema") -> TextToImageSource:
    """Load a text-to-image model.

    Args:
        source: a published name; a folder in the layout of Scale-RAE, local or a hub id; or a
            results folder, a folder of checkpoints or a checkpoint of ``rae-xla train t2i``.
        part: of a checkpoint: ``ema`` or ``model``.

    Raises:
        UserError: the model is missing, or its files do not fit each other.
    """
    source = local_source(source)
    if is_published_folder(source):
        return TextToImageSource(load_scale_rae(source), None, source)
    checkpoint = newest_checkpoint(source)
    content = CheckpointContent(checkpoint)
    config = content["config"]
    section = config.get("text_to_image")
    if section is None:
        raise UserError(
            f"{checkpoint} is not from `rae-xla train t2i`: its configuration has no "
            "text_to_image section"
        )
    if part not in content:
        present = ", ".join(name for name in ("model", "ema") if name in content)
        raise UserError(f"{checkpoint} has no {part!r} weights; it has {present}")
    state = dict(content[part])
    model = _build(state, section, config["misc"]["latent_size"], str(checkpoint))
    return TextToImageSource(model, config, str(checkpoint))


def local_source(source: str) -> str:
    """Return a source of a model; the folder of its files if it is a published name or a hub id.

    Raises:
        UserError: its files are not on this machine, and cannot be downloaded.
    """
    if storage.exists(source):
        return source
    published = TEXT_TO_IMAGE.get(source)
    repository = source if published is None else published.repository
    if not is_hub_id(repository):
        return source
    try:
        return str(local_folder(repository, list(MODEL_FILES)))
    except UserError as error:
        if repository not in {model.repository for model in TEXT_TO_IMAGE.values()}:
            raise
        raise UserError(
            f"the text-to-image model {source} needs the files {', '.join(MODEL_FILES)} of "
            f"{repository}: copy them to a folder and give that, or download them with `hf "
            f"download {repository}` ({error})"
        ) from error


def is_published_folder(source: str) -> bool:
    """Return whether a source is a hub id or a folder with ``config.json``."""
    if storage.is_remote(source):
        return False
    return (Path(source) / "config.json").is_file() or is_hub_id(source)


def export_text_to_image(source: str, folder: str, part: str = "ema") -> None:
    """Write the model of a run as a folder in the layout of Scale-RAE.

    Args:
        source: see ``load_text_to_image``.
        folder: must not exist.
        part: of a checkpoint.
    """
    save_scale_rae(load_text_to_image(source, part).model, folder)


def flow_of(config: RunConfig) -> SizedFlow:
    """Return the flow of the latents of a text-to-image configuration.

    Raises:
        UserError: text-to-image models do not predict what it says.
    """
    params = config.transport.params
    t_eps = DATA_T_EPS if params.t_eps is None else params.t_eps
    return SizedFlow(config.time_dist_shift, params.prediction, t_eps)


def head_settings(section: Mapping[str, Any], channels: int, tokens: int) -> HeadSettings:
    """Return the settings of the model that a configuration describes.

    Args:
        section: ``text_to_image`` of the configuration, as a dict.
        channels: of a latent token.
        tokens: latent tokens of an image.

    Raises:
        UserError: the settings do not fit each other.
    """
    head = section["head"]
    prompt = None
    if section.get("read", "queries") == "tokens":
        reading = section["prompt"]
        prompt = PromptReading(
            length=section["length"],
            dropped=reading["dropped_tokens"],
            layers=tuple(reading["layers"]),
            average=reading["average_layers"],
        )
    wide = {}
    if "wide_depth" in head:
        wide = {
            "hidden_size": head["wide_hidden_size"],
            "depth": head["wide_depth"],
            "num_heads": head["wide_num_heads"],
            "num_time_tokens": head["num_time_tokens"],
        }
    return HeadSettings(
        tokens=tokens,
        channels=channels,
        condition_dim=head["condition_dim"],
        hidden_size=head["hidden_size"],
        depth=head["depth"],
        num_heads=head["num_heads"],
        condition_dropout_prob=head["condition_dropout_prob"],
        inject=section.get("inject", "per-token"),
        prompt=prompt,
        wide=WideHead(**wide),
        base_model_depth=head.get("base_model_depth"),
    )


def _build(
    state: Mapping[str, Tensor], section: Mapping[str, Any], latent: Sequence[int], where: str
) -> TextToImageModel:
    """Build the model of a checkpoint from its published state dict and its configuration."""
    lm_config = _language_model_config(section, where)
    if _EMBEDDINGS in state:
        lm_config.vocab_size = state[_EMBEDDINGS].shape[0]  # tokens may have been added
    state = untied(state, bool(lm_config.tie_word_embeddings))
    if section.get("inject", "per-token") == "per-token":
        # Also of a run that started from a model with other sizes than its configuration.
        probability = section["head"]["condition_dropout_prob"]
        settings = infer_settings(state, {"diffusion_class_dropout_prob": probability}, where)
    else:
        settings = _first_settings(section, latent)
    with torch.device("meta"):
        model = TextToImageModel(LanguageModel(lm_config), settings)
    load_strict(model, from_published(state), where, assign=True)
    model.language_model.reset_constants()
    return model.eval()


def _first_settings(section: Mapping[str, Any], latent: Sequence[int]) -> HeadSettings:
    """Return the settings of the model of a run, which may have started from another model."""
    if section.get("ckpt") is None:
        channels, height, width = latent
        return head_settings(section, channels, height * width)
    ckpt = local_source(section["ckpt"])
    if is_published_folder(ckpt):
        return infer_settings({}, read_json(ckpt, "config.json") or {}, ckpt)
    config = read_checkpoint_manifest(newest_checkpoint(ckpt))["config"]
    return _first_settings(config["text_to_image"], config["misc"]["latent_size"])


def _language_model_config(section: Mapping[str, Any], where: str) -> Any:
    if section.get("ckpt") is not None:
        ckpt = local_source(section["ckpt"])
        if is_published_folder(ckpt):
            return language_model_config(read_json(ckpt, "config.json") or {}, ckpt)
        manifest = read_checkpoint_manifest(newest_checkpoint(ckpt))
        return _language_model_config(manifest["config"]["text_to_image"], ckpt)
    if section.get("language_model_config") is not None:
        return read_lm_config(section["language_model_config"])
    if section.get("language_model") is None:
        raise UserError(f"{where} does not say which language model it was trained from")
    return read_lm_config(section["language_model"])
