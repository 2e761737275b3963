"""``rae-xla checkpoints``: list, verify, export, prune."""

import pytest
import torch
from checkpoint_cases import DiscStage, save

from rae_xla.cli import main as cli
from rae_xla.interop.checkpoint_folder import list_checkpoints
from rae_xla.interop.checkpoint_tensors import open_weights


@pytest.fixture
def run(tmp_path):
    """A results folder with checkpoints of 10, 20 and 30 steps."""
    for step in (10, 20, 30):
        save(tmp_path / "run/checkpoints", step, DiscStage(seed=step))
    return tmp_path / "run"


def break_newest(run):
    path = run / "checkpoints/step-00000030/ema-0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def test_list_and_verify(run, capsys):
    assert cli.main(["checkpoints", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "step-00000010  " in lines[0]
    assert "torch, data=1 x fsdp=1, 1 process" in lines[0]
    assert cli.main(["checkpoints", "verify", str(run)]) == 0
    break_newest(run)
    capsys.readouterr()
    assert cli.main(["checkpoints", "verify", str(run)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.endswith(": whole, 6 files") for line in out] == [True, True, False]
    assert "ema-0.distcp does not have the checksum" in out[2]
    assert cli.main(["checkpoints", "verify", str(run / "checkpoints/step-00000020")]) == 0


def test_export_is_one_file_of_the_published_layout(run, tmp_path):
    out = tmp_path / "out.pt"
    assert cli.main(["checkpoints", "export", str(run), "--out", str(out), "--step", "20"]) == 0
    content = torch.load(out, weights_only=True)
    parts = {"model", "ema", "optimizer", "disc", "disc_optimizer"}
    assert set(content) == {*parts, "step", "config", "scheduler"}
    assert content["step"] == 20
    expected = DiscStage(seed=20).model.state_dict()["0.weight"]
    assert torch.equal(content["ema"]["published.0.weight"], expected)
    command = ["checkpoints", "export", str(run), "--out", str(out), "--weights-only"]
    assert cli.main(command) == 0
    content = torch.load(out, weights_only=True)
    assert set(content) == {"model", "ema", "step", "config", "scheduler"}
    assert content["step"] == 30
    assert open_weights(out)["ema"].keys() == open_weights(run)["ema"].keys()


def test_export_of_a_step_that_is_not_there(run, tmp_path, capsys):
    command = ["checkpoints", "export", str(run), "--out", str(tmp_path / "o.pt"), "--step", "15"]
    assert cli.main(command) == 2
    assert "no checkpoint of step 15; there are 10, 20, 30" in capsys.readouterr().err


def test_prune_keeps_what_it_is_told_and_the_newest_whole_one(run, capsys):
    left = run / "checkpoints/step-00000040.unfinished"
    left.mkdir()
    command = ["checkpoints", "prune", str(run), "--keep-last", "1"]
    assert cli.main([*command, "--keep-every", "20", "--dry-run"]) == 0
    assert "step-00000010: would be deleted" in capsys.readouterr().out
    assert left.exists()
    break_newest(run)
    assert cli.main(command) == 0
    assert not left.exists()
    there = [c.step for c in list_checkpoints(str(run / "checkpoints"))]
    assert there == [20, 30], "the broken one is not all there is"


def test_prune_deletes_nothing_where_nothing_is_whole(run, capsys):
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("")
    assert cli.main(["checkpoints", "prune", str(run), "--keep-last", "1"]) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert len(list_checkpoints(str(run / "checkpoints"))) == 3


def test_where_there_is_none(tmp_path, capsys):
    assert cli.main(["checkpoints", "list", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert cli.main(["checkpoints", "list", str(tmp_path / "typo")]) == 2
    assert f"there is no {tmp_path / 'typo'}" in capsys.readouterr().err
