"""Checks of settings of the ``text_to_image`` section that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rae_xla.config.ranges import COUNT, Range
from rae_xla.config.text_to_image import CaptionsConfig, TextToImageConfig
from rae_xla.config.typed import Origin
from rae_xla.errors import UserError

_LANGUAGE_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip


def check_text_to_image(section: TextToImageConfig, origin: Origin) -> None:
    """Raise ``UserError`` if a list is empty where one is needed, or values do not fit others."""
    for name, values in (
        ("train", section.train),
        ("prompt.layers", section.prompt.layers),
        ("captions.sources", section.captions.sources),
        ("captions.prompts", section.captions.prompts),
    ):
        if not values:
            _fail(name, origin, "the list is empty: name at least one")
    period, count = section.row_pattern
    if count > period:
        _fail(
            "row_pattern",
            origin,
            "expected (period, count) with a count of at least 1 and at most the period, got "
            f"{[period, count]}",
        )
    if section.head.hidden_size % section.head.num_heads:
        _fail(
            "head.num_heads",
            origin,
            f"{section.head.num_heads} does not divide head.hidden_size {section.head.hidden_size}",
        )
    _check_captions(section.captions, origin)
    if section.language_model_config is not None:
        _check_language_model(section.language_model_config, section.prompt.layers, origin)


def check_number(number: Any, accepted: Range, where: str) -> None:
    """Raise ``UserError`` unless a value of a section without a schema is a number of a range."""
    if type(number) not in (int, float) or not accepted.contains(number):
        described = accepted.describe(number if type(number) is int else 0)
        raise UserError(f"{where}: expected {described}, got {number}")


def _fail(name: str, origin: Origin, reason: str) -> None:
    key = f"text_to_image.{name}"
    raise UserError(f"{key} ({origin.describe(key)}): {reason}")


def _check_captions(captions: CaptionsConfig, origin: Origin) -> None:
    weights, sources = captions.weights, captions.sources
    if weights and len(weights) != len(sources):
        _fail(
            "captions.weights",
            origin,
            f"{len(weights)} numbers for {len(sources)} sources: give one for each",
        )
    if weights and not any(weights):
        _fail("captions.weights", origin, "expected a number above 0, got only 0")
    for prompt in captions.prompts:
        if "{caption}" not in prompt:
            _fail("captions.prompts", origin, f"{prompt!r} has no {{caption}}, which is replaced")


def _check_language_model(
    values: Mapping[str, Any], layers: tuple[int, ...], origin: Origin
) -> None:
    """Check the sizes of a language model; its class checks the rest."""
    section = "language_model_config"
    for name in _LANGUAGE_SIZES:
        if name in values:
            key = f"text_to_image.{section}.{name}"
            check_number(values[name], COUNT, f"{key} ({origin.describe(key)})")
            if type(values[name]) is float:
                _fail(f"{section}.{name}", origin, f"expected an integer, got {values[name]}")
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width and heads and "head_dim" not in values and width % heads:
        _fail(
            f"{section}.hidden_size",
            origin,
            f"expected a multiple of num_attention_heads {heads}, got {width}",
        )
    depth = values.get("num_hidden_layers")
    if depth and max(layers) > depth:
        _fail("prompt.layers", origin, f"{max(layers)}, but the language model has {depth} layers")
