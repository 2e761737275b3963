"""Training state: its creation, the tensors of its checkpoint, and restoring it."""

import pytest
import torch
from checkpoint_cases import DiscTask, LinearTask, one_process, save
from golden_case import GOLDEN, load_case
from rae_cases import build_rae

from rae_xla.checkpoint.manager import (
    Checkpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.provenance import check_dit_file
from rae_xla.checkpoint.resume import choose_checkpoint
from rae_xla.checkpoint.tensors import CheckpointContent
from rae_xla.checkpoint.train_state import make_state, restore, state_tensors
from rae_xla.errors import UserError
from rae_xla.models.dit_dh import DiTDH

PARTS = {"model", "ema", "optimizer", "disc", "disc_optimizer"}


def test_all_tensors_are_restored(tmp_path):
    backend, task = one_process(), DiscTask(seed=0)
    state = make_state(task.model, backend, disc=task.disc)
    with torch.no_grad():
        for number, tensor in enumerate(state_tensors(task, state).values()):
            tensor.add_(number + 1)
    before = {k: t.clone() for k, t in state_tensors(task, state).items()}
    assert {name.partition("/")[0] for name in before} == PARTS
    save(tmp_path, 7, task, state)
    other = DiscTask(seed=1)
    restored = restore(other, backend, choose_checkpoint(str(tmp_path), backend))
    assert restored.step == 7
    after = state_tensors(other, restored)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def old_value(number, tensor):
    """What tests/golden/checkpoint holds as the tensor with this number."""
    return (torch.arange(tensor.numel()).reshape(tensor.shape) / 8 + number).to(tensor.dtype)


def test_a_checkpoint_of_version_0_1_is_restored():
    """Written by the code before ``rae_xla.checkpoint`` existed, with the same ``DiscTask``."""
    [checkpoint] = list_checkpoints(str(GOLDEN / "checkpoint"))
    manifest = read_checkpoint_manifest(checkpoint)
    assert manifest["code"].startswith("rae_xla 0.1.0 4a65cfb176ce")
    verify(checkpoint, manifest)
    task = DiscTask()
    state = restore(
        task, one_process(), choose_checkpoint(str(GOLDEN / "checkpoint"), one_process())
    )
    assert state.step == 10
    tensors = state_tensors(task, state)
    assert {name.partition("/")[0] for name in tensors} == PARTS
    for number, (name, tensor) in enumerate(tensors.items()):
        assert torch.equal(tensor, old_value(number, tensor)), name
    content = CheckpointContent(checkpoint)
    assert set(content) == {"step", "config", "scheduler", *PARTS}
    check_dit_file(checkpoint.path, build_rae("dinov2"))
    with pytest.raises(UserError, match="latent statistics"):
        check_dit_file(checkpoint.path, build_rae("dinov2", normalization_stat_path=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.append(torch.nn.Linear(2, 2)), r"\(model\) .*1\."),
        (lambda m: m.__setitem__(0, torch.nn.Linear(4, 2)), r"0\.weight .*\(3, 4\)"),
        (lambda m: m.double(), r"0\.weight is torch\.float32, expected torch\.float64"),
        (lambda m: m[0].bias.requires_grad_(False), r"\(optimizer\) .*0\.bias/exp_avg"),
    ],
    ids=["names", "shapes", "dtypes", "moments"],
)
def test_a_mismatch_is_found_before_any_tensor_is_read(tmp_path, change, message):
    checkpoint = save(tmp_path, 1)
    task = LinearTask(seed=2)
    change(task.model)
    before = {k: t.clone() for k, t in task.model.state_dict().items()}
    for file in (tmp_path / "step-00000001").glob("*.distcp"):
        file.unlink()  # reading one would fail
    with pytest.raises(UserError, match=message):
        restore(task, one_process(), checkpoint)
    after = task.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_discriminator_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no disc, disc_optimizer"):
        restore(DiscTask(seed=0), one_process(), save(tmp_path, 1))


def test_the_path_of_a_checkpoint_contains_its_step():
    assert Checkpoint("gs://bucket/run/step-00000120").step == 120


def test_tables_are_not_trained_and_moments_exist_before_the_first_step():
    config = load_case("train/stage2_four_steps").meta["config"]
    state = make_state(DiTDH(**config), one_process())
    trained = state.model.parameters()
    assert "pos_embed" not in trained
    assert "t_embedder.W" not in trained
    assert state.model.optimizer_tensors().keys() == {
        f"{name}/{key}" for name in trained for key in ("exp_avg", "exp_avg_sq")
    }


def test_a_checkpoint_with_another_shape_is_an_error():
    config = load_case("train/stage2_four_steps").meta["config"]
    saved = {"model": DiTDH(**config | {"hidden_size": [32, 24]}).state_dict()}
    with pytest.raises(UserError, match=r"run/step-1\.pt .*DiTDH"):
        make_state(DiTDH(**config), one_process(), saved, "run/step-1.pt")
