"""Rollback: skipped steps are counted, rolled back from, and end in an error."""

import json
import math
import multiprocessing
import shutil
import weakref

import pytest
import torch
from checkpoint_cases import one_process
from tiny import make_shards
from torch import nn

from rae_xla.checkpoint.manager import Checkpoint, list_checkpoints
from rae_xla.checkpoint.tensors import CheckpointContent
from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.errors import UserError
from rae_xla.train import trainer
from rae_xla.train.callbacks import preemption
from rae_xla.train.tasks import TASKS
from rae_xla.train.tasks.base import LossTask

BAD_STEPS = range(12, 17)
"""Steps (from 0) whose loss is not finite."""


class FlakyTask(LossTask):
    """Predicts the mean colour of an image from noise; the loss of some steps is NaN."""

    weights_key = "stage_1.ckpt"
    bad_steps = BAD_STEPS

    def __init__(self, config, backend, data, steps_per_epoch):
        super().__init__(config, backend, data, steps_per_epoch)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3))

    def loss(self, batch, draws):
        colours = batch["image"].float().mean((2, 3)) / 255
        error = (self.model(draws.normal("noise", (4,))) - colours).square().mean(1)
        first, last = self.bad_steps.start, self.bad_steps.stop - 1
        is_bad = (batch["step"] >= first) & (batch["step"] <= last)
        return torch.where(is_bad, math.nan, error)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_training_data(make_shards(tmp_path_factory.mktemp("data")), None)


@pytest.fixture
def train(data, monkeypatch):
    monkeypatch.setitem(TASKS, "stage1", FlakyTask)

    def train(folder, *overrides):
        config = load_config(
            overrides=[
                "training.steps=30", "training.global_batch_size=8", "training.log_every=1",
                "training.max_skipped=4", "training.optimizer.lr=1e-2", "training.ema_decay=0.9",
                "checkpoint.every_steps=5", "checkpoint.keep_last=100",
                "training.sample_every=0", "data.image_size=32", *overrides,
            ]
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        return trainer.train(config, one_process(), data, "stage1", folder)

    return train


def content(folder, step):
    return CheckpointContent(Checkpoint(str(folder / f"checkpoints/step-{step:08d}")))


def are_equal(one, other, parts=("model", "ema", "optimizer")):
    return all(
        torch.equal(tensor, other[part][name])
        for part in parts
        for name, tensor in one[part].items()
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rollback_skips_the_bad_steps(train, tmp_path, caplog):
    folder = tmp_path / "run"
    assert train(folder).checkpoint.step == 30
    assert "step 16: rolled back to the state of" in caplog.text
    assert "step-00000010; the steps since then count as skipped" in caplog.text
    logged = lines(folder)
    assert [line["step"] for line in logged if "train/rollbacks" in line] == [16]
    assert logged[-1]["step"] == 30
    # Steps 11 to 16 had no effect: neither the ones whose loss was not finite nor the good ones.
    expected = tmp_path / "skipping"
    FlakyTask.bad_steps = range(10, 17)
    try:
        train(expected, "training.max_skipped=100")
    finally:
        FlakyTask.bad_steps = BAD_STEPS
    assert are_equal(content(folder, 30), content(expected, 30), ("model", "optimizer"))


def test_a_run_resumed_from_before_the_rollback_rolls_back_again(train, tmp_path):
    train(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for checkpoint in list_checkpoints(str(tmp_path / "killed/checkpoints")):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)
    train(tmp_path / "killed")
    assert are_equal(content(tmp_path / "run", 30), content(tmp_path / "killed", 30))


def test_the_old_state_is_freed_before_the_rollback(train, tmp_path, monkeypatch):
    """Two states would not fit into the memory of the devices."""
    states = []
    restore = trainer.restore

    def counting(*args):
        assert [state() for state in states] == [None] * len(states)
        state = restore(*args)
        states.append(weakref.ref(state))
        return state

    monkeypatch.setattr(trainer, "restore", counting)
    train(tmp_path / "run")
    assert len(states) == 2


def test_the_loader_is_closed(train, tmp_path):
    train(tmp_path / "run", "training.steps=5", "data.num_workers=1")
    assert multiprocessing.active_children() == []


def test_a_run_in_python_is_protected_like_one_of_the_command_line(train, data, tmp_path):
    train(tmp_path / "run", "training.steps=5")
    assert (tmp_path / "run/config.yaml").exists()
    with pytest.raises(UserError, match=r"another configuration.*optimizer\.lr"):
        train(tmp_path / "run", "training.steps=5", "training.optimizer.lr=1e-3")
    with pytest.raises(UserError, match="no task 'stage3': choose one of stage1, stage2"):
        trainer.train(load_config(), one_process(), data, "stage3", tmp_path)


def test_too_many_rollbacks_are_an_error(train, tmp_path, monkeypatch):
    monkeypatch.setattr(FlakyTask, "bad_steps", range(12, 100))
    with pytest.raises(
        UserError,
        match=r"4 steps in a row.*after 2 rollbacks.*step-00000010;.*stage_1\.ckpt=",
    ):
        train(tmp_path / "run")
    rollbacks = [x["train/rollbacks"] for x in lines(tmp_path / "run") if "train/rollbacks" in x]
    assert rollbacks == [1, 2]
    assert list_checkpoints(str(tmp_path / "run/checkpoints"))[-1].step == 10


def test_a_gradient_above_skip_grad_norm_is_skipped(train, tmp_path):
    with pytest.raises(UserError, match="no checkpoint from before"):
        train(tmp_path / "run", "training.skip_grad_norm=1e-9")
    assert [line["train/skipped"] for line in lines(tmp_path / "run")] == [1, 1, 1, 1]


def test_a_stopped_run_saves_at_that_step_and_resumes_identically(train, tmp_path, monkeypatch):
    monkeypatch.setattr(FlakyTask, "bad_steps", range(0))
    train(tmp_path / "uninterrupted")
    exchange = preemption.RequestExchange
    agree = exchange.agree
    monkeypatch.setattr(
        exchange,
        "agree",
        lambda self, step, requests: {"stop"} if step == 13 else agree(self, step, requests),
    )
    result = train(tmp_path / "stopped")
    assert result.stopped
    assert result.checkpoint.step == 13
    monkeypatch.setattr(exchange, "agree", agree)
    assert train(tmp_path / "stopped").checkpoint.step == 30
    assert are_equal(content(tmp_path / "uninterrupted", 30), content(tmp_path / "stopped", 30))
