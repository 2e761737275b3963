"""Training of models whose head attends to the tokens of the prompt: losses, resume, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_to_image_runs import Runs
from tiny_captions import LANGUAGE_MODEL, make_captioned_shards, make_config

from rae_xla.config import load_config
from rae_xla.data.mixture import CaptionedMixture, open_training_data
from rae_xla.errors import UserError
from rae_xla.interop.text_to_image import export_text_to_image, load_text_to_image
from rae_xla.train.tasks.text_to_image import TextToImageTask

TOKENS = {
    "language_model_config": LANGUAGE_MODEL,
    "read": "tokens",
    "inject": "in-context",
    "length": 24,
    "train": ["connector", "head"],
    "head": {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "wide_hidden_size": 48,
        "wide_depth": 1,
        "wide_num_heads": 2,
        "base_model_depth": 1,
        "condition_dropout_prob": 0.5,
    },
}


def make_runs(folder: Path) -> Runs:
    """Return the runs of a configuration whose head attends to the tokens of the prompt."""
    config = make_config(
        folder,
        make_captioned_shards(folder, count=24),
        text_to_image=TOKENS,
        training={"steps": 6, "optimizer": {"lr": 1e-2}},
        checkpoint={"every_steps": 3},
    )
    # Large times, as for large latents: the loss of data prediction is divided by t^2.
    changes = "transport: {params: {prediction: x}}\nmisc: {time_dist_shift_base: 16}\n"
    config.write_text(config.read_text() + changes)
    return Runs(folder, config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def six_steps(runs: Runs) -> list[dict[str, Any]]:
    return runs.train("six")


def column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def test_only_the_head_is_trained(runs: Runs, six_steps: list[dict[str, Any]]) -> None:
    assert column(six_steps, "train/text_loss") == [0.0] * 6
    runs.train("one", "training.steps=1")
    first, last = runs.checkpoint("one"), runs.checkpoint("six")
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert "diff_head.model.y_embedder.proj.weight" in moved
    assert "diff_head.model.base_final_layer.linear.weight" in moved
    assert all(name.startswith("diff_head.model.") for name in moved)


def test_resumed_run_is_bit_identical(runs: Runs, six_steps: list[dict[str, Any]]) -> None:
    runs.train("resumed", "training.steps=3")
    resumed = runs.train("resumed")
    assert column(resumed, "train/loss") == column(six_steps, "train/loss")
    expected, actual = runs.checkpoint("six", "ema"), runs.checkpoint("resumed", "ema")
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_exported_folder_is_the_model_of_the_run(
    runs: Runs, six_steps: object, tmp_path: Path
) -> None:
    export_text_to_image(str(runs.folder / "six"), str(tmp_path / "model"))
    first = load_text_to_image(str(runs.folder / "six")).model
    second = load_text_to_image(str(tmp_path / "model")).model
    assert second.settings == first.settings
    expected, actual = first.state_dict(), second.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    tuned = runs.train(
        "tuned",
        "training.steps=1",
        f"text_to_image.ckpt={tmp_path / 'model'}",
        "text_to_image.language_model_config=null",
    )
    # The same batch, times and noise: the head has learned.
    assert column(tuned, "train/image_loss")[0] < 0.95 * column(six_steps, "train/image_loss")[0]


@pytest.mark.parametrize("name", ["cross-attention", "queries"])
def test_other_combinations_train(runs: Runs, name: str) -> None:
    settings = ["text_to_image.inject=cross-attention", "training.steps=2"]
    if name == "queries":
        settings = ["text_to_image.read=queries", "text_to_image.length=96", "training.steps=2"]
    lines = runs.train(name, *settings)
    assert np.isfinite(column(lines, "train/loss")).all()
    state = load_text_to_image(str(runs.folder / name)).model.state_dict()
    assert ("null.dropout_embedding" in state) == (name == "queries")


def test_empty_prompts_are_drawn_by_sample_and_not_in_validation(runs: Runs) -> None:
    config = load_config(runs.config)
    data = open_training_data(config.data.train, None)
    assert isinstance(data, CaptionedMixture)
    rows = TextToImageTask.row_arrays(config, data)
    first = np.stack([rows.arrays(0, i, 0, i)["ids"] for i in range(24)])
    again = np.stack([rows.arrays(0, i, 0, 7)["ids"] for i in range(24)])
    assert np.array_equal(first, again)  # whatever the row
    empty = (first == -1).all(1)
    assert 0 < empty.sum() < 24
    later = np.stack([rows.arrays(0, i, 1, i)["ids"] for i in range(24)])
    assert ((later == -1).all(1) != empty).any()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_to_image.row_pattern=[2,1]", "every row generates its only image"),
        ("text_to_image.prompt.dropped_tokens=24", "all of the 24 tokens"),
        ("text_to_image.inject=per-token", "a condition for each latent token"),
        ("transport.params.prediction=noise", "predict velocity or x"),
        ("text_to_image.head.base_model_depth=9", "from 1 to 2, got 9"),
    ],
)
def test_wrong_settings_are_one_error(runs: Runs, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        runs.train("wrong", override)


def test_muon_trains_the_head_like_adamw_the_rest(runs: Runs) -> None:
    muon = ("training.optimizer.type=muon", "training.steps=2", "text_to_image.train=[head]")
    lines = runs.train("muon", *muon)
    assert np.isfinite(column(lines, "train/grad_norm")).all()
    moments = runs.checkpoint("muon", "optimizer")
    matrix = "head.y_embedder.proj.weight"
    assert any(name.startswith(matrix) and name.endswith("exp_avg") for name in moments)
    assert not any(name.startswith(matrix) and name.endswith("exp_avg_sq") for name in moments)
    assert any(name.endswith("bias/exp_avg_sq") for name in moments)
