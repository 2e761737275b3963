"""Language models of transformers behind our interface: masks, layers, loading, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from rae_xla.errors import UserError
from rae_xla.models.text_to_image.language_model import (
    LanguageModel,
    attention_mask,
    load_language_model,
    read_lm_config,
)
from rae_xla.ops import dispatch

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
CAUSAL = {"num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 1},
    "qwen2_tied": {
        "model_type": "qwen2",
        **SIZES,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", **SIZES, **CAUSAL, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **SIZES, **CAUSAL},
    "bert": {"model_type": "bert", **SIZES},
}


def tiny(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(read_lm_config(CONFIGS[name])).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = read_lm_config(CONFIGS[name])
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    theirs = auto.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "lm")
    ours = load_language_model(tmp_path / "lm").eval()
    ids = torch.randint(32, (3, 9))
    padding = torch.arange(9) >= torch.tensor([9, 4, 1])[:, None]
    expected = theirs(ids, attention_mask=(~padding).long(), output_hidden_states=True)
    states = ours.layer_states(ids, padding, [0, 1, -1])
    for actual, layer in zip(states, (0, 1, -1), strict=True):
        torch.testing.assert_close(actual[~padding], expected.hidden_states[layer][~padding])
    final = ours(ours.embedding(ids), padding)
    torch.testing.assert_close(final, states[-1])
    if ours.is_causal:
        logits = final @ ours.output_weight.T
        torch.testing.assert_close(logits[~padding], expected.logits[~padding])


def test_layers_that_do_not_exist_are_refused() -> None:
    model = tiny("qwen2")
    count = model.config.num_hidden_layers
    model.mark_read_layers([0, count, -1])
    with pytest.raises(UserError, match=f"has {count} layers"):
        model.mark_read_layers([count + 1])


@pytest.mark.parametrize("name", ["qwen2", "qwen2_tied"])
def test_tied_embeddings_are_one_parameter(name: str) -> None:
    model = tiny(name)
    tables = [p for p in model.parameters() if p.shape == (32, 16)]
    assert len(tables) == (1 if name == "qwen2_tied" else 2)
    assert len(model.state_dict()) == len(list(model.parameters()))


def test_padding_on_the_right_does_not_change_a_causal_model() -> None:
    model = tiny("qwen2")
    embeddings = torch.randn(1, 6, 16)
    other = torch.cat([embeddings[:, :4], torch.randn(1, 2, 16)], 1)
    torch.testing.assert_close(model(embeddings)[:, :4], model(other)[:, :4])


def test_constants_are_restored_after_building_without_storage() -> None:
    model = tiny("qwen3")
    with torch.device("meta"):
        other = LanguageModel(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.reset_constants()
    ids = torch.randint(32, (2, 7))
    expected = model(model.embedding(ids))
    torch.testing.assert_close(other.eval()(other.embedding(ids)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_rows_without_padding_use_causal_kernels(name: str) -> None:
    model = tiny(name)
    embeddings = torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    calls = []
    with dispatch.register("attention", "cpu", lambda *given: calls.append(given[3:])):
        causal = model(embeddings)
        assert calls == [(None, True)] * 2  # one of each layer
        torch.testing.assert_close(model(embeddings, padding), causal)
        assert len(calls) == 2


def test_mask_is_causal_and_has_no_empty_row() -> None:
    padding = torch.tensor([[False, False, True]])
    mask = attention_mask(3, padding, is_causal=True, device=torch.device("cpu"))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    both = attention_mask(3, padding, is_causal=False, device=torch.device("cpu"))
    assert both[0, 0].tolist() == [[True, True, False], [True, True, False], [True, True, True]]


def test_model_with_attention_windows_is_refused() -> None:
    config = {**CONFIGS["qwen2"], "use_sliding_window": True, "max_window_layers": 0}
    with pytest.raises(UserError, match="attention window"):
        LanguageModel(read_lm_config({**config, "sliding_window": 4}))


def test_missing_models_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_language_model(tmp_path)
    with pytest.raises(UserError, match="model_type"):
        read_lm_config({"hidden_size": 4})
    with pytest.raises(UserError, match="no language model of type 'vit'"):
        LanguageModel(read_lm_config({"model_type": "vit"}))


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_model = AutoModelForCausalLM.from_config(read_lm_config(CONFIGS["llama"]))
    tiny_model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(UserError, match="do not fit it"):
        load_language_model(tmp_path)
