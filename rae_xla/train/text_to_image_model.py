"""The text-to-image model of a configuration, with its pretrained parts."""

from __future__ import annotations

from dataclasses import asdict

import torch

from rae_xla.config import RunConfig
from rae_xla.config.text_to_image import TextToImageConfig
from rae_xla.data.captions import open_tokenizer
from rae_xla.errors import UserError
from rae_xla.interop.text_to_image import head_settings, load_text_to_image, local_source
from rae_xla.models.text_to_image.language_model import (
    LanguageModel,
    add_tokens,
    load_language_model,
    read_lm_config,
)
from rae_xla.models.text_to_image.model import TextToImageModel


def build_model(config: RunConfig, channels: int, tokens: int) -> TextToImageModel:
    """Build the model of a configuration, with its pretrained parts.

    Args:
        config: of the run, with a ``text_to_image`` section.
        channels: of a latent token.
        tokens: latent tokens of an image.

    Raises:
        UserError: a part is missing, or the checkpoint has other latents than ``stage_1``.
    """
    settings = section_of(config)
    if settings.ckpt is not None:
        model = load_text_to_image(settings.ckpt).model
        found = (model.settings.channels, model.settings.tokens)
        if found != (channels, tokens):
            raise UserError(
                f"text_to_image.ckpt {settings.ckpt} generates {found[1]} tokens of {found[0]} "
                f"channels, but the encoder of stage_1 has {tokens} of {channels}: choose the "
                "encoder that it was trained with"
            )
        reads = "queries" if model.settings.prompt is None else "tokens"
        if (reads, model.settings.inject) != (settings.read, settings.inject):
            raise UserError(
                f"text_to_image.ckpt {settings.ckpt} has read: {reads} and inject: "
                f"{model.settings.inject}, not {settings.read} and {settings.inject}: write these"
            )
        _check_language_model(settings, model)
        return model
    sizes = head_settings(asdict(settings), channels, tokens)
    generator_state = torch.get_rng_state()
    torch.manual_seed(config.training.global_seed)
    try:
        language_model = _language_model(settings)
        model = TextToImageModel(language_model, sizes)
    finally:
        torch.set_rng_state(generator_state)
    if settings.read == "tokens":
        return model
    tokenizer = open_tokenizer(tokenizer_folder(settings), tokens, settings.length)
    add_tokens(language_model, (tokenizer.image_start, tokenizer.image_end))
    return model


def freeze(model: TextToImageModel, trained: tuple[str, ...]) -> None:
    """Make only some parts trainable: ``language_model``, ``connector`` and ``head``."""
    for name, parameter in model.named_parameters():
        first = name.split(".", 1)[0]
        part = first if first in ("language_model", "head") else "connector"
        parameter.requires_grad_(part in trained and name not in model.constants)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("text_to_image.train is empty: name at least one part to train")


def section_of(config: RunConfig) -> TextToImageConfig:
    """Return the ``text_to_image`` section, or raise ``UserError`` if there is none."""
    if config.text_to_image is None:
        raise UserError(
            "text-to-image training needs a text_to_image section: see configs/t2i for examples"
        )
    return config.text_to_image


def tokenizer_folder(settings: TextToImageConfig) -> str:
    """Return the folder of the tokenizer: its own, or that of the model it belongs to."""
    folder = settings.tokenizer
    if folder is None and settings.ckpt is not None:
        folder = local_source(settings.ckpt)
    folder = folder or settings.language_model
    if folder is None:
        raise UserError("text_to_image.tokenizer is not set: give a folder with tokenizer.json")
    return folder


def _check_language_model(settings: TextToImageConfig, model: TextToImageModel) -> None:
    """Raise if the configuration names another language model than the checkpoint contains."""
    named = settings.language_model_config or settings.language_model
    if named is None:
        return
    wanted, found = read_lm_config(named), model.language_model.config
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        ours, theirs = getattr(wanted, key, None), getattr(found, key, None)
        if ours != theirs:
            raise UserError(
                f"text_to_image.ckpt {settings.ckpt} contains a language model with {key} "
                f"{theirs}, but the one of text_to_image.language_model has {ours}: choose the one "
                "that it was trained with, or write text_to_image.language_model=null and "
                "text_to_image.language_model_config=null"
            )


def _language_model(settings: TextToImageConfig) -> LanguageModel:
    if settings.language_model_config is not None:
        return LanguageModel(read_lm_config(settings.language_model_config))
    if settings.language_model is None:
        raise UserError(
            "text_to_image.language_model is not set: give the folder of a causal model of "
            "transformers, or text_to_image.ckpt"
        )
    model = load_language_model(settings.language_model)
    if not model.is_causal and settings.read == "queries":
        raise UserError(
            f"text_to_image.language_model {settings.language_model} is an encoder "
            f"({model.config.model_type}): the queries need a causal model, or write read: tokens"
        )
    return model
