"""Steps that give nothing: skipped, counted, gone back from, and at last an error."""

import json
import math
import shutil

import pytest
import torch
from checkpoint_cases import LinearStage, one_process
from tiny import make_shards

from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import Checkpoint, list_checkpoints
from rae_xla.interop.checkpoint_tensors import CheckpointContent
from rae_xla.train import loop
from rae_xla.train.adamw import AdamW
from rae_xla.train.step import make_train_step

BAD = range(12, 17)
"""Steps (from 0) whose loss is not finite."""


class FlakyStage(LinearStage):
    """Learns the mean colour of the pictures; from the data of some steps it learns nothing."""

    bad = BAD

    def __init__(self, config, runtime, data, steps_per_epoch):
        super().__init__(seed=0)
        self._config, self._runtime = config, runtime
        self.frozen = torch.nn.ModuleList()

    def phase(self, step):
        return "colours"

    def inputs(self, step):
        return {"lr": torch.tensor(1e-2)}

    def make_step(self, phase, state):
        def losses(batch, draws):
            colours = batch["image"].float().mean((2, 3)) / 255
            made = state.model.module(draws.normal("noise", (4,)))
            error = (made - colours).square().mean(1)
            low, high = self.bad.start, self.bad.stop
            bad = (batch["step"] >= low) & (batch["step"] < high)
            return torch.where(bad, math.nan, error)

        training = self._config.training
        return make_train_step(
            losses,
            state,
            AdamW((0.9, 0.95), 1e-8, 0.0),
            seed=0,
            ema_decay=0.9,
            clip_grad=None,
            accumulate=1,
            runtime=self._runtime,
            skip_norm=training.skip_grad_norm,
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_training_data(make_shards(tmp_path_factory.mktemp("data")), None)


@pytest.fixture
def train(data, monkeypatch):
    monkeypatch.setitem(loop.STAGES, "stage1", FlakyStage)

    def train(folder, *overrides):
        config = load_config(
            overrides=[
                "training.steps=30", "training.global_batch_size=8", "training.log_every=1",
                "training.max_skipped=4", "checkpoint.every_steps=5", "checkpoint.keep_last=100",
                "training.sample_every=0", "data.image_size=32", *overrides,
            ]
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        return loop.train(config, one_process(), data, "stage1", folder)

    return train


def content(folder, step):
    return CheckpointContent(Checkpoint(str(folder / f"checkpoints/step-{step:08d}")))


def same(one, other, parts=("model", "ema", "optimizer")):
    return all(
        torch.equal(tensor, other[part][name])
        for part in parts
        for name, tensor in one[part].items()
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_back_past_the_bad_steps_and_on(train, tmp_path, capfd):
    folder = tmp_path / "run"
    assert train(folder).checkpoint.step == 30
    said = capfd.readouterr().err
    assert "step 16: going on with the state of" in said
    assert "step-00000010; the steps since then count as skipped" in said
    logged = lines(folder)
    assert [line["step"] for line in logged if "train/rollbacks" in line] == [16]
    assert logged[-1]["step"] == 30
    # steps 11 to 16 did nothing: neither those whose loss was not finite nor the good ones of them
    expected = tmp_path / "skipping"
    FlakyStage.bad = range(10, 17)
    try:
        train(expected, "training.max_skipped=100")
    finally:
        FlakyStage.bad = BAD
    assert same(content(folder, 30), content(expected, 30), ("model", "optimizer"))


def test_started_again_from_before_it_goes_back_in_the_same_way(train, tmp_path):
    train(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for checkpoint in list_checkpoints(str(tmp_path / "killed/checkpoints")):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)
    train(tmp_path / "killed")
    assert same(content(tmp_path / "run", 30), content(tmp_path / "killed", 30))


def test_too_many_times_is_an_error(train, tmp_path, monkeypatch):
    monkeypatch.setattr(FlakyStage, "bad", range(12, 100))
    with pytest.raises(
        UserError,
        match=r"4 steps in a row.*back 2 times.*good checkpoint.*step-00000010\. .*stage_1\.ckpt=",
    ):
        train(tmp_path / "run")
    rollbacks = [x["train/rollbacks"] for x in lines(tmp_path / "run") if "train/rollbacks" in x]
    assert rollbacks == [1, 2]
    assert list_checkpoints(str(tmp_path / "run/checkpoints"))[-1].step == 10


def test_a_gradient_above_the_limit_is_a_bad_step(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint from before"):
        train(tmp_path / "run", "training.skip_grad_norm=1e-9")
    assert [line["train/skipped"] for line in lines(tmp_path / "run")] == [1, 1, 1, 1]


def test_a_run_told_to_stop_saves_at_that_step_and_goes_on_the_same(train, tmp_path, monkeypatch):
    monkeypatch.setattr(FlakyStage, "bad", range(0))
    train(tmp_path / "whole")
    asked = loop.agreed
    monkeypatch.setattr(
        loop, "agreed", lambda r, step, words: {"stop"} if step == 13 else asked(r, step, words)
    )
    outcome = train(tmp_path / "stopped")
    assert outcome.stopped
    assert outcome.checkpoint.step == 13
    monkeypatch.setattr(loop, "agreed", asked)
    assert train(tmp_path / "stopped").checkpoint.step == 30
    assert same(content(tmp_path / "whole", 30), content(tmp_path / "stopped", 30))
