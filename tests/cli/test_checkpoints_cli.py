"""``rae-xla checkpoints``: list, verify, export, prune."""

import pytest
import torch
from checkpoint_cases import DiscTask, LinearTask, save
from golden_case import GOLDEN
from rae_cases import build_rae

from rae_xla.checkpoint.manager import list_checkpoints
from rae_xla.checkpoint.tensors import open_weights
from rae_xla.cli import main as cli


@pytest.fixture
def run(tmp_path):
    """A results folder with checkpoints of 10, 20 and 30 steps."""
    for step in (10, 20, 30):
        save(tmp_path / "run/checkpoints", step, DiscTask(seed=step))
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
    assert [line.endswith(": intact, 6 files") for line in out] == [True, True, False]
    assert "ema-0.distcp" in out[2]
    assert "checksum" in out[2]
    (run / "checkpoints/step-00000020/notes.txt").touch()
    assert cli.main(["checkpoints", "verify", str(run / "checkpoints/step-00000020")]) == 0
    assert "intact, 6 files; not listed, so not verified: notes.txt" in capsys.readouterr().out


def test_export_writes_one_file_in_the_published_layout(run, tmp_path):
    out = tmp_path / "out.pt"
    assert cli.main(["checkpoints", "export", str(run), "--out", str(out), "--step", "20"]) == 0
    content = torch.load(out, weights_only=True)
    parts = {"model", "ema", "optimizer", "disc", "disc_optimizer"}
    assert set(content) == {*parts, "step", "config", "scheduler"}
    assert content["step"] == 20
    expected = DiscTask(seed=20).model.state_dict()["0.weight"]
    assert torch.equal(content["ema"]["published.0.weight"], expected)


@pytest.mark.parametrize("options", [("--what", "weights"), ("--weights-only",)])
def test_export_of_the_weights_alone(run, tmp_path, options):
    out = tmp_path / "out.pt"
    assert cli.main(["checkpoints", "export", str(run), "--out", str(out), *options]) == 0
    content = torch.load(out, weights_only=True)
    assert set(content) == {"model", "ema", "step", "config", "scheduler"}
    assert content["step"] == 30
    assert open_weights(out)["ema"].keys() == open_weights(run)["ema"].keys()


class DecoderTask(LinearTask):
    """Trains an autoencoder; its decoder differs between checkpoints."""

    def __init__(self, shift):
        self.model = build_rae("dinov2").requires_grad_(False)
        self.model.decoder.requires_grad_(True)
        with torch.no_grad():
            self.model.decoder.decoder_pred.bias += shift

    def to_published_state_dict(self, state):
        return dict(state)


def test_export_of_the_decoder(tmp_path, capsys):
    for step in (1, 2):
        save(tmp_path / "run/checkpoints", step, DecoderTask(step))
    out = tmp_path / "decoder.pt"
    command = ["checkpoints", "export", str(tmp_path / "run"), "--what", "decoder"]
    assert cli.main([*command, "--out", str(out), "--step", "1"]) == 0
    first = torch.load(out, weights_only=True)
    assert cli.main([*command, "--out", str(out), "--weights", "model"]) == 0
    assert "step-00000002 (model)" in capsys.readouterr().out
    second = torch.load(out, weights_only=True)
    original = torch.load(GOLDEN / "rae/dinov2/decoder.pt", weights_only=True)
    assert first.keys() == second.keys() == original.keys()
    for exported, shift in ((first, 1), (second, 2)):
        assert torch.equal(exported["decoder_pred.bias"], original["decoder_pred.bias"] + shift)
    assert (tmp_path / "decoder.pt.manifest.json").exists()

    old_spelling = ["export", "decoder", "--ckpt", str(tmp_path / "run")]
    assert cli.main([*old_spelling, "--out", str(tmp_path / "old.pt")]) == 0
    assert "checkpoints export RUN --what decoder" in capsys.readouterr().err
    old = torch.load(tmp_path / "old.pt", weights_only=True)
    assert all(torch.equal(old[name], second[name]) for name in second)


def test_export_of_the_decoder_of_a_file(tmp_path):
    state = build_rae("dinov2").state_dict()
    torch.save({"step": 3, "model": state, "ema": state}, tmp_path / "c.pt")
    out = tmp_path / "decoder.pt"
    command = ["checkpoints", "export", str(tmp_path / "c.pt"), "--what", "decoder"]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert torch.load(out, weights_only=True).keys() == {
        name.removeprefix("decoder.") for name in state if name.startswith("decoder.")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--step", "15"), "10, 20, 30"),
        (("--weights", "ema"), "--what decoder"),
        (("--what", "decoder"), "holds no decoder"),
    ],
    ids=["missing step", "weights of a whole checkpoint", "no decoder"],
)
def test_export_errors(run, tmp_path, capsys, options, message):
    out = tmp_path / "o.pt"
    assert cli.main(["checkpoints", "export", str(run), "--out", str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_prune_keeps_the_newest_intact_checkpoint(run, capsys):
    incomplete = run / "checkpoints/step-00000040.unfinished"
    incomplete.mkdir()
    command = ["checkpoints", "prune", str(run), "--keep-last", "1"]
    assert cli.main([*command, "--keep-every", "20", "--dry-run"]) == 0
    assert "step-00000010: would be deleted" in capsys.readouterr().out
    assert incomplete.exists()
    break_newest(run)
    assert cli.main(command) == 0
    assert not incomplete.exists()
    remaining = [c.step for c in list_checkpoints(str(run / "checkpoints"))]
    assert remaining == [20, 30], "30 is broken, so 20 is kept as well"


def test_prune_deletes_nothing_if_all_are_broken(run, capsys):
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("")
    assert cli.main(["checkpoints", "prune", str(run), "--keep-last", "1"]) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert len(list_checkpoints(str(run / "checkpoints"))) == 3


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    assert cli.main(["checkpoints", "list", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert cli.main(["checkpoints", "list", str(tmp_path / "typo")]) == 2
    assert f"{tmp_path / 'typo'} does not exist" in capsys.readouterr().err
