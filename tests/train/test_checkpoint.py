"""What a checkpoint holds, which one a run goes on from, and how it is restored."""

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import DiscStage, LinearStage, one_process, save

from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import Checkpoint, list_checkpoints
from rae_xla.train.checkpoint import check_shared, choose_checkpoint, restore, state_tensors
from rae_xla.train.state import make_state


def damage(folder, step, file="model-0.distcp"):
    path = folder / f"step-{step:08d}" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_of_a_state_comes_back(tmp_path):
    runtime, stage = one_process(), DiscStage(seed=0)
    state = make_state(stage.model, runtime, disc=stage.disc)
    with torch.no_grad():
        for number, tensor in enumerate(state_tensors(stage, state).values()):
            tensor.add_(number + 1)
    before = {k: t.clone() for k, t in state_tensors(stage, state).items()}
    assert {name.partition("/")[0] for name in before} == {
        "model", "ema", "optimizer", "disc", "disc_optimizer"
    }  # fmt: skip
    save(tmp_path, 7, stage, state)
    other = DiscStage(seed=1)
    restored = restore(other, runtime, choose_checkpoint(str(tmp_path), runtime))
    assert restored.step == 7
    after = state_tensors(other, restored)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_none_is_chosen_where_there_is_none(tmp_path):
    assert choose_checkpoint(str(tmp_path / "nowhere"), one_process()) is None


@pytest.mark.parametrize("file", ["model-0.distcp", "optimizer-0.distcp", ".metadata"])
def test_broken_ones_are_named_and_passed_over(tmp_path, capsys, file):
    for step in (10, 20, 30):
        save(tmp_path, step)
    damage(tmp_path, 20, file)
    (tmp_path / "step-00000030" / file).unlink()
    found = choose_checkpoint(str(tmp_path), one_process())
    assert found.step == 10
    warned = capsys.readouterr().err
    assert f"step-00000030 is broken: {file} is missing" in warned
    assert f"step-00000020 is broken: {file} does not have the checksum" in warned
    assert f"going back to {found}" in warned
    assert len(list_checkpoints(str(tmp_path))) == 3, "nothing was deleted"


def test_all_broken_is_an_error_that_deletes_nothing(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints.*step-00000020.*manifest"):
        choose_checkpoint(str(tmp_path), one_process())
    assert len(list_checkpoints(str(tmp_path))) == 2


def test_before_a_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert choose_checkpoint(str(tmp_path), one_process(), before=30).step == 20
    assert choose_checkpoint(str(tmp_path), one_process(), before=10) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.append(torch.nn.Linear(2, 2)), r"\(model\) does not fit.*missing 1\."),
        (
            lambda m: m.__setitem__(0, torch.nn.Linear(4, 2)),
            r"another shape: 0\.weight is \(3, 4\)",
        ),
        (lambda m: m.double(), r"0\.weight is torch\.float32, expected torch\.float64"),
        (lambda m: m[0].bias.requires_grad_(False), r"\(optimizer\) does not fit.*0\.bias/exp_avg"),
    ],
    ids=["names", "shapes", "types", "moments"],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path, change, message):
    checkpoint = save(tmp_path, 1)
    stage = LinearStage(seed=2)
    change(stage.model)
    before = {k: t.clone() for k, t in stage.model.state_dict().items()}
    for file in (tmp_path / "step-00000001").glob("*.distcp"):
        file.unlink()  # whoever read would fail
    with pytest.raises(UserError, match=message):
        restore(stage, one_process(), checkpoint)
    after = stage.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_discriminator_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="has no disc, disc_optimizer"):
        restore(DiscStage(seed=0), one_process(), save(tmp_path, 1))


def test_another_format_is_no_broken_checkpoint(tmp_path):
    checkpoint = save(tmp_path, 1)
    path = tmp_path / "step-00000001/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2; this version reads 1"):
        choose_checkpoint(str(tmp_path), one_process())
    assert list_checkpoints(str(tmp_path)) == [checkpoint]


class Elsewhere(SimpleNamespace):
    """Process 1 of two, which does not see what process 0 has written."""

    def exchange(self, text):
        return ["yes", text]


def test_a_folder_that_is_not_shared(tmp_path):
    with pytest.raises(UserError, match=r"process 1 does not see.*checkpoint\.dir=gs://"):
        check_shared(str(tmp_path), Elsewhere(process_index=1, process_count=2))
    check_shared("gs://bucket/run", Elsewhere(process_index=1, process_count=2))


def test_the_path_of_a_checkpoint_tells_its_step():
    assert Checkpoint("gs://bucket/run/step-00000120").step == 120
