"""Conversations as token ids and labels: golden cases, dropped rows, prompts, tokenizers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from golden_case import GOLDEN, load_case

from rae_xla.data.conversations import (
    IGNORE,
    ConversationTokenizer,
    DroppedRowError,
    add_delimiters,
    generation_turns,
    parse_conversation,
    read_tokenizer,
)
from rae_xla.errors import UserError

FOLDER = GOLDEN / "t2i" / "tokenization" / "tokenizer"
CASES = {case["name"]: case for case in load_case("t2i/tokenization/cases").meta["cases"]}
# The reference drops it for another reason, or, for the last one, trains on the template alone.
REASONS = {
    "gpt_first_turn_with_image_dropped": "placeholders",
    "two_placeholders_one_image": "placeholders",
    "overlong_image": "length",
    "one_too_long_image": "length",
    "system_first": "role",
    "overlong_text_truncated": "no_answer",
}


def tokenizer() -> ConversationTokenizer:
    return ConversationTokenizer(read_tokenizer(FOLDER), tokens_per_image=16, length=128)


@pytest.mark.parametrize("name", [name for name in CASES if name not in REASONS])
def test_rows_match_golden_values(name: str) -> None:
    case, out = CASES[name], load_case("t2i/tokenization/cases").under(f"out.{name}")
    row = tokenizer().row(case["conversations"], case["n_images"])
    assert row.ids.tolist() == out["input_ids"].tolist()
    assert row.labels.tolist() == out["labels"].tolist()
    assert row.length == min(case["length_before_padding"], 128)
    assert np.count_nonzero(row.labels != IGNORE) == case["n_supervised"]
    assert row.truncated == 0


@pytest.mark.parametrize("name", REASONS)
def test_unusable_rows_are_dropped_with_their_reason(name: str) -> None:
    case = CASES[name]
    with pytest.raises(DroppedRowError) as error:
        tokenizer().row(case["conversations"], case["n_images"])
    assert error.value.reason == REASONS[name]


def test_too_many_images_and_empty_conversations_are_dropped() -> None:
    turns = [{"from": "human", "value": "<image>" * 8}, {"from": "gpt", "value": "a"}]
    with pytest.raises(DroppedRowError, match="more images than fit"):
        tokenizer().row(turns, 8)
    with pytest.raises(DroppedRowError, match="no turns"):
        tokenizer().row([], 0)


def test_answers_that_are_cut_are_counted() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "one two " * 40}]
    row = tokenizer().row(turns, 0)
    assert row.length == 128
    assert row.truncated > 0


def test_prompts_match_golden_values() -> None:
    for prompt in load_case("t2i/tokenization/cases").meta["inference_prompts"]:
        ids = tokenizer().prompt(prompt["question"], prompt["with_image"])
        assert ids == prompt["ids"]


def test_a_prompt_is_the_beginning_of_the_training_row() -> None:
    prompt = tokenizer().prompt("A tree")
    row = tokenizer().row(generation_turns("A tree"), 1)
    assert row.ids[: len(prompt)].tolist() == prompt


def test_tokenizer_without_the_delimiters_is_refused_until_they_are_added() -> None:
    plain = read_tokenizer(FOLDER)
    content = plain.to_str().replace("<im_start>", "<unused_1>").replace("<im_end>", "<unused_2>")
    from tokenizers import Tokenizer

    other = Tokenizer.from_str(content)
    with pytest.raises(UserError, match="has no <im_start>, <im_end>"):
        ConversationTokenizer(other, 16, 128)
    assert add_delimiters(other) == [297, 298]
    assert ConversationTokenizer(other, 16, 128).image_start == 297


def test_missing_or_damaged_tokenizer_is_one_error(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        read_tokenizer(tmp_path)


def test_turns_with_other_key_names_are_read() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert parse_conversation(turns) == [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Yo"},
    ]
    with pytest.raises(ValueError, match="no text"):
        parse_conversation([{"from": "human"}])


def test_tokenising_does_not_import_torch() -> None:
    code = "import sys, rae_xla.data.conversations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
