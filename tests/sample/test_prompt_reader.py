"""Rows of prompts on devices that need static graphs."""

from __future__ import annotations

from typing import cast

import pytest
from text_to_image_cases import PROMPT_LENGTH, prompts, tiny_model

from rae_xla.config import MeshConfig
from rae_xla.config.schema import RuntimeConfig
from rae_xla.data.captions import ConversationTokenizer
from rae_xla.runtime import start
from rae_xla.sample.prompt_reader import PromptReader

NO_TOKENIZER = cast("ConversationTokenizer", None)


def test_conditions_are_as_long_as_the_null_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that the head attends to are not padded further for a static graph."""
    monkeypatch.setattr("rae_xla.sample.prompt_reader.requires_static_graph", lambda _: True)
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    reader = PromptReader(tiny_model(), backend, NO_TOKENIZER)
    rows = reader.rows(prompts().tolist())
    assert rows["ids"].shape == (3, PROMPT_LENGTH)
    assert reader.read(rows).shape[1] == reader.read(reader.rows(prompts()[2:].tolist())).shape[1]


def test_rows_before_queries_are_padded_to_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_xla.sample.prompt_reader.requires_static_graph", lambda _: True)
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    model = tiny_model(inject="per-token", prompt=None, base_model_depth=None)
    reader = PromptReader(model, backend, NO_TOKENIZER)
    lengths = {reader.rows([[1] * count])["ids"].shape[1] for count in range(3, 40)}
    assert len(lengths) < 4
