"""Text-to-image training from the command's parts: losses, resume, groups, starting points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from text_to_image_runs import Runs
from tiny_captions import (
    LANGUAGE_MODEL,
    TOKENIZER,
    make_captioned_shards,
    make_config,
    make_mixture,
    make_talks,
    talk,
)
from transformers import AutoModelForCausalLM

from rae_xla.config import load_config
from rae_xla.errors import UserError
from rae_xla.models.text_to_image.language_model import LanguageModel, read_lm_config
from rae_xla.models.text_to_image.scale_rae import (
    from_published,
    load_scale_rae,
    save_scale_rae,
    to_published,
)
from rae_xla.train.metrics import unknown_names
from rae_xla.train.text_to_image_model import build_model


class Project(Runs):
    """Runs on shards with captions."""

    def __init__(self, folder: Path) -> None:
        self.shards = make_captioned_shards(folder)
        super().__init__(folder, make_config(folder, self.shards))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("t2i"))


@pytest.fixture(scope="module")
def ten_steps(project: Project) -> list[dict[str, Any]]:
    return project.train("ten")


def column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def test_both_losses_decrease_and_are_logged(ten_steps: list[dict[str, Any]]) -> None:
    names = ("train/loss", "train/text_loss", "train/image_loss")
    losses = {name: column(ten_steps, name) for name in names}
    assert all(values[-1] < values[0] - 0.2 for values in losses.values())
    # An untrained head predicts zero: the loss is E|noise - data|^2, the sum of two unit variances.
    assert losses["train/image_loss"][0] == pytest.approx(2.0, abs=0.15)
    sums = [t + i for t, i in zip(*list(losses.values())[1:], strict=True)]
    assert losses["train/loss"] == pytest.approx(sums, rel=1e-6)
    assert not unknown_names(name for line in ten_steps for name in line if "/" in name)


def test_resumed_run_is_bit_identical(project: Project, ten_steps: list[dict[str, Any]]) -> None:
    project.train("resumed", "training.steps=5")
    resumed = project.train("resumed")
    names = ("train/loss", "train/grad_norm", "train/token_accuracy")
    for name in names:
        assert column(resumed, name) == column(ten_steps, name)
    for part in ("model", "ema", "optimizer"):
        expected, actual = project.checkpoint("ten", part), project.checkpoint("resumed", part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.parametrize("pattern", ["[1,1]", "[2,1]"])
def test_micro_batches_do_not_change_the_losses(project: Project, pattern: str) -> None:
    # The conversation of a row depends on its micro-batch, so the pattern has the same rows here.
    rows = f"text_to_image.row_pattern={pattern}"
    common = (rows, "training.steps=3", "text_to_image.times_per_image=2")
    if pattern == "[1,1]":
        whole = project.train(f"whole{pattern}", *common)
        parts = project.train(f"parts{pattern}", *common, "training.grad_accum_steps=2")
        for name in ("train/loss", "train/image_loss", "train/grad_norm"):
            assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-4)
    else:
        mixed = project.train(f"mixed{pattern}", *common, "training.grad_accum_steps=2")
        assert column(mixed, "train/image_loss")[0] == pytest.approx(2.0, abs=0.2)
        assert column(mixed, "train/text_loss")[-1] < column(mixed, "train/text_loss")[0]


def test_checkpoint_has_the_published_keys(project: Project, ten_steps: object) -> None:
    model = project.checkpoint("ten")
    assert "model.latent_queries" in model
    assert "diff_head.model.dit_blocks.0.attn.qkv.weight" in model
    assert "lm_head.weight" not in model  # tied to the embeddings, stored once


def test_only_the_chosen_parts_are_trained(project: Project, ten_steps: object) -> None:
    project.train("head", "training.steps=2", "text_to_image.train=[head]")
    before = build(project)
    after = project.checkpoint("head")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("diff_head.model.") for name in moved)
    assert all(name.startswith("head.") for name in project.checkpoint("head", "optimizer"))
    with pytest.raises(UserError, match="name at least one"):
        project.train("none", "text_to_image.train=[]")


def build(project: Project) -> dict[str, torch.Tensor]:
    """Return the initial weights of a run by their published names."""
    model = build_model(load_config(project.config), channels=32, tokens=16)
    return to_published(model.state_dict())


def test_average_covers_the_language_model_on_request(project: Project, ten_steps: object) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(project.checkpoint("ten")[name], project.checkpoint("ten", "ema")[name])
    project.train("averaged", "training.steps=2", "text_to_image.average_language_model=true")
    weights, average = (project.checkpoint("averaged", part)[name] for part in ("model", "ema"))
    assert not torch.equal(weights, average)
    head = "diff_head.model.final_layer.linear.weight"
    assert not torch.equal(project.checkpoint("ten")[head], project.checkpoint("ten", "ema")[head])


def test_run_starts_from_a_published_folder(project: Project, ten_steps: object) -> None:
    model = build_model(load_config(project.config), channels=32, tokens=16)
    model.load_state_dict(from_published(project.checkpoint("ten", "ema")))
    save_scale_rae(model, project.folder / "published")
    assert load_scale_rae(str(project.folder / "published")).settings == model.settings
    with pytest.raises(UserError, match=r"a language model with hidden_size 32, but .* has 64"):
        project.train(
            "other",
            f"text_to_image.ckpt={project.folder / 'published'}",
            "text_to_image.language_model_config.hidden_size=64",
        )
    tuned = project.train(
        "tuned",
        "training.steps=1",
        f"text_to_image.ckpt={project.folder / 'published'}",
        "text_to_image.language_model_config=null",
    )
    # Its losses go on where those of the first run ended.
    assert column(tuned, "train/text_loss")[0] < 5.4


def test_run_starts_from_a_language_model_of_transformers(project: Project, tmp_path: Path) -> None:
    torch.manual_seed(1)
    small = {**LANGUAGE_MODEL, "vocab_size": 295, "tie_word_embeddings": False}
    theirs = AutoModelForCausalLM.from_config(read_lm_config(small))
    theirs.save_pretrained(tmp_path / "lm")
    config = load_config(
        project.config,
        overrides=[
            "text_to_image.language_model_config=null",
            f"text_to_image.language_model={tmp_path / 'lm'}",
            f"text_to_image.tokenizer={TOKENIZER}",
        ],
    )
    model = build_model(config, channels=32, tokens=16).language_model
    table = theirs.get_input_embeddings().weight
    assert model.embedding.weight.shape == (297, 32)  # grown by the two delimiters
    assert torch.equal(model.embedding.weight[:295], table)
    torch.testing.assert_close(model.embedding.weight[296], table.mean(0))
    assert model.output_weight.shape == (297, 32)
    assert LanguageModel(model.config).embedding.weight.shape == (297, 32)


def test_validation_losses_are_reproducible(project: Project) -> None:
    settings = (
        "training.steps=2",
        "eval.eval_interval=2",
        "eval.num_images=10",
        f"data.val={project.shards}",
    )
    first = project.train("val", *settings, "eval.batch_size=4")
    second = project.train("val2", *settings, "eval.batch_size=16")
    names = [name for line in first for name in line if name.startswith("eval/")]
    assert "eval/image_loss_at_0.44" in names
    assert len(names) == 11
    for name in names:
        assert column(first, name) == pytest.approx(column(second, name), rel=1e-5)


def test_rows_of_several_sources_train_together(project: Project) -> None:
    lines = project.train("mixture", *make_mixture(project.folder / "mixed"), "training.steps=3")
    for name in ("index", "texts", "talks"):
        losses = column(lines, f"train/loss/{name}")
        assert len(losses) == 3
        assert all(0 < loss < 20 for loss in losses)
    # An untrained head: E|noise - data|^2 of the images alone, whatever rows have none.
    assert column(lines, "train/image_loss")[0] == pytest.approx(2.0, abs=0.2)
    assert column(lines, "train/skipped") == [0, 0, 0]
    # The loss of the texts has no image part.
    assert column(lines, "train/loss/texts")[0] < 6.5 < column(lines, "train/loss/index")[0]


def test_a_batch_without_images_trains_the_language_model_alone(project: Project) -> None:
    texts = make_talks(project.folder / "alone", "texts", [talk("a b", "c d")] * 12)
    lines = project.train("texts", f"data.train={texts}", "training.steps=3")
    assert column(lines, "train/image_loss") == [0, 0, 0]
    assert column(lines, "train/skipped") == [0, 0, 0]
    assert column(lines, "train/text_loss")[2] < column(lines, "train/text_loss")[0]
    head = "diff_head.model.dit_blocks.0.attn.qkv.weight"
    weights = project.checkpoint("texts")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert torch.equal(weights[head], build(project)[head])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_to_image.length=20", "an image alone takes 16 tokens"),
        ("text_to_image.row_pattern=[2,3]", "count of at least 1 and at most the period"),
        ("text_to_image.row_pattern=[3,1]", "period of 3, which does not divide the 8 rows"),
        ("text_to_image=null", "needs a text_to_image section"),
        ("stage_1=null", "misc.latent_size is unknown"),
        ("text_to_image.tokenizer=null", "text_to_image.tokenizer is not set"),
    ],
)
def test_wrong_settings_are_one_error(project: Project, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        project.train("wrong", override)
