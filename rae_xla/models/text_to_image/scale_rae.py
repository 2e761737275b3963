"""Checkpoints of Scale-RAE: keys, sizes, and folders of config.json and sharded safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import read_json, read_weights
from rae_xla.models.pretrained.model_folder import new_folder
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.model import TextToImageModel
from rae_xla.models.text_to_image.settings import HeadSettings
from rae_xla.models.weights import check_fits, load_strict, write_safetensors

# Our name of a part -> its published name. The language model comes last: its prefix is a prefix
# of others.
_PREFIXES = (
    ("latent_queries", "model.latent_queries"),
    ("mm_projector.", "model.mm_projector."),
    ("diff_head_projector.", "diff_head_projector."),
    ("head.", "diff_head.model."),
    ("statistics.", "diff_head."),
    ("aux_vision_head.", "aux_vision_head."),
    ("language_model.head.", "lm_head."),
    ("language_model.base.", "model."),
)
_TIED = "lm_head.weight", "model.embed_tokens.weight"
# Keys of a published config.json that describe the image part. The sizes themselves are in the
# shapes of the tensors.
_IMAGE_KEYS = ("diffusion_", "vision_", "mm_", "aux_", "image_", "tokenizer_", "tune_")
MODEL_TYPE = "scale_rae_qwen"
"""``model_type`` that we write; the published code registers its own class by ``architectures``."""
DEFAULT_BASE_DIM = 4096.0
_SETTINGS = "text_to_image"
"""Key of ``config.json`` for the settings of a model of another kind than Scale-RAE's."""


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of ``TextToImageModel`` to the published keys."""
    return {_renamed(name, 0, 1): tensor for name, tensor in state.items()}


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published state dict to the keys of ``TextToImageModel``.

    A copy of tied embeddings under ``lm_head.weight`` must be removed before, see :func:`untied`.
    """
    return {_renamed(name, 1, 0): tensor for name, tensor in state.items()}


def untied(state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Return a published state dict without the copy of tied embeddings, if there is one.

    Raises:
        UserError: the embeddings are tied according to the configuration, but differ.
    """
    head, embedding = _TIED
    if not tied or head not in state:
        return dict(state)
    if embedding in state and not state[head].is_meta:
        equal = state[head].shape == state[embedding].shape
        if not (equal and torch.equal(state[head], state[embedding])):
            raise UserError(
                f"{head} and {embedding} differ, but the configuration has tie_word_embeddings: "
                "set it to false in config.json, or copy the checkpoint again"
            )
    return {name: tensor for name, tensor in state.items() if name != head}


def infer_settings(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> HeadSettings:
    """Read the sizes of the image part from the shapes of a published state dict.

    The settings of a model that Scale-RAE does not have are in its ``config.json``.

    Args:
        state: tensors by published key; they may be on the meta device.
        config: the published ``config.json``, of which the dropout probability is read.
        source: the checkpoint, for error messages.

    Raises:
        UserError: a tensor that determines a size is missing.
    """
    if _SETTINGS in config:
        return HeadSettings.from_dict(config[_SETTINGS])

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise UserError(f"{source} is not a checkpoint of Scale-RAE: it has no {name}")
        return tuple(state[name].shape)

    head = "diff_head.model."
    hidden_size, channels = shape(f"{head}x_embedder.proj.weight")[:2]
    head_dim = shape(f"{head}feat_rope.freqs_cos")[1]
    blocks = {name.split(".")[3] for name in state if name.startswith(f"{head}dit_blocks.")}
    has_null = f"{head}y_embedder.dropout_embedding" in state
    dropout = float(config.get("diffusion_class_dropout_prob") or 0.1) if has_null else 0.0
    projector = "diff_head_projector.weight"
    statistics = "diff_head.data_mean"
    return HeadSettings(
        tokens=shape("model.latent_queries")[0],
        channels=channels,
        condition_dim=shape(projector)[0] if projector in state else 0,
        hidden_size=hidden_size,
        depth=len(blocks),
        num_heads=hidden_size // head_dim,
        condition_dropout_prob=dropout,
        statistics=shape(statistics) if statistics in state else None,
        auxiliary="aux_vision_head.0.weight" in state,
    )


def load_scale_rae(folder: str) -> TextToImageModel:
    """Load a published text-to-image model strictly, in eval mode with float32 weights.

    Args:
        folder: local folder or hub id of a ``config.json`` and safetensors.

    Raises:
        UserError: a file is missing, keys or shapes do not fit, or the vocabulary of the language
            model differs from its configuration.
    """
    config = read_json(folder, "config.json")
    if config is None:
        raise UserError(f"{folder} has no config.json: give a folder of a Scale-RAE model")
    lm_config = language_model_config(config, folder)
    state = untied(read_weights(folder), bool(lm_config.tie_word_embeddings))
    rows = state[_TIED[1]].shape[0] if _TIED[1] in state else lm_config.vocab_size
    if rows != lm_config.vocab_size:
        raise UserError(
            f"{folder}: the weights have {rows} token embeddings, config.json says "
            f"{lm_config.vocab_size} (vocab_size): copy both from one model"
        )
    settings = infer_settings(state, config, folder)
    with torch.device("meta"):
        model = TextToImageModel(LanguageModel(lm_config), settings)
    weights = {name: tensor.float() for name, tensor in from_published(state).items()}
    load_strict(model, weights, folder, assign=True)
    model.language_model.reset_constants()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in model.constants)
    return model.eval()


def save_scale_rae(
    model: TextToImageModel,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write a model as a published folder: ``config.json`` and sharded safetensors.

    Args:
        model: to write, with parameters on the CPU.
        folder: must not exist.
        extra: further keys of ``config.json``, such as the ones that were read.
        shard_size: largest size of a weight file.

    Raises:
        UserError: the folder exists or cannot be written.
    """
    state = to_published(model.state_dict())
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    with new_folder(folder) as unfinished:
        for file, names in split.filename_to_tensors.items():
            write_safetensors({name: state[name] for name in names}, unfinished / file)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            _write_json(unfinished / "model.safetensors.index.json", index)
        _write_json(unfinished / "config.json", {**(extra or {}), **published_config(model)})


def published_config(model: TextToImageModel) -> dict[str, Any]:
    """Return the ``config.json`` of a model, with the key names of the published ones."""
    settings = model.settings
    ours = {} if settings.is_published else {_SETTINGS: settings.to_dict()}
    return {
        **model.language_model.config.to_dict(),
        **ours,
        "model_type": MODEL_TYPE,
        "text_model_type": model.language_model.config.model_type,
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "vision_tower_aux_token_len_list": [settings.tokens],
        "mm_hidden_size": settings.channels,
        "mm_projector_type": "mlp2x_gelu",
        "diffusion_model_channels": settings.channels,
        "diffusion_model_hidden_size": settings.hidden_size,
        "diffusion_model_depth": settings.depth,
        "diffusion_model_heads": settings.num_heads,
        "diffusion_model_z_channels": settings.condition_dim,
        "diffusion_class_dropout_prob": settings.condition_dropout_prob,
        "aux_regression": settings.auxiliary,
    }


def language_model_config(config: Mapping[str, Any], source: str) -> Any:
    """Return the configuration of the language model in a published ``config.json``.

    Its ``model_type`` names the published class, which transformers does not know: the type of the
    language model is ``text_model_type``, or the Qwen2 that all published models have.

    Raises:
        UserError: a size is missing.
    """
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in needed if key not in config]:
        raise UserError(f"{source}: config.json has no {', '.join(missing)}")
    dropped = ("model_type", "text_model_type", "architectures", "torch_dtype", "dtype", _SETTINGS)
    values = {
        key: value
        for key, value in config.items()
        if not key.startswith(_IMAGE_KEYS) and key not in dropped
    }
    return read_lm_config({"model_type": config.get("text_model_type", "qwen2"), **values})


def check_published(model: TextToImageModel, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ``UserError`` unless a published state dict fits the model; reads no values."""
    tied = model.language_model.head is None
    check_fits(model, from_published(untied(state, tied)), source)


def time_shift(config: Mapping[str, Any], settings: HeadSettings) -> float:
    """Return the time shift that a published configuration describes."""
    base = float(config.get("diffusion_base_dim") or DEFAULT_BASE_DIM)
    return math.sqrt(settings.channels * settings.tokens / base)


def _renamed(name: str, source: int, target: int) -> str:
    for prefixes in _PREFIXES:
        if prefixes[source] == "diff_head." and not name.startswith("diff_head.data_"):
            continue
        if name.startswith(prefixes[source]):
            return prefixes[target] + name.removeprefix(prefixes[source])
    return name


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
