"""Weights from wherever they are: a file, a checkpoint, a run; and no more read than is wanted."""

import pytest
import torch
from checkpoint_cases import DiscStage, LinearStage, save

import rae_xla
from rae_xla.errors import UserError
from rae_xla.interop.checkpoint_folder import BrokenCheckpointError
from rae_xla.interop.checkpoint_tensors import CheckpointContent, find_weights, open_weights
from rae_xla.interop.decoder import export_decoder


def test_a_checkpoint_reads_like_the_file_it_would_be(tmp_path):
    stage = DiscStage(seed=3)
    content = CheckpointContent(save(tmp_path, 10, stage))
    assert set(content) == {
        "step", "config", "scheduler", "model", "ema", "optimizer", "disc", "disc_optimizer"
    }  # fmt: skip
    assert len(content) == 8
    assert content["step"] == 10
    assert content["scheduler"] == {"next_step": {"lr": 0.5}}
    ours, saved = stage.model.state_dict(), content["ema"]
    assert {f"published.{name}" for name in ours} == saved.keys()
    assert all(torch.equal(ours[name], saved[f"published.{name}"]) for name in ours)
    assert set(content["optimizer"]) == {
        f"0.{name}/{moment}" for name in ("weight", "bias") for moment in ("exp_avg", "exp_avg_sq")
    }
    with pytest.raises(KeyError):
        content["decoder"]


def test_what_is_not_wanted_may_be_broken(tmp_path):
    content = CheckpointContent(save(tmp_path, 10))
    for part in ("model", "optimizer"):
        path = tmp_path / f"step-00000010/{part}-0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "published.0.weight" in content["ema"]
    with pytest.raises(BrokenCheckpointError, match=r"model-0\.distcp does not have the checksum"):
        content["model"]


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    save(tmp_path / "run/checkpoints", 10)
    save(tmp_path / "run/checkpoints", 20)
    for path in ("run", "run/checkpoints", "run/checkpoints/step-00000020"):
        assert find_weights(tmp_path / path) == str(tmp_path / "run/checkpoints/step-00000020")
        assert find_weights(f"{tmp_path / path}/").rstrip("/").endswith("step-00000020")
    assert find_weights(tmp_path / "file.pt") == str(tmp_path / "file.pt")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_weights(tmp_path)


def test_instantiate_takes_the_average_of_a_run(tmp_path, monkeypatch):
    class Published(LinearStage):
        def __init__(self):
            self.model = rae_xla.instantiate(TINY)

        def publish(self, state):
            return dict(state)

    stage = Published()
    save(tmp_path / "checkpoints", 10, stage)
    loaded = rae_xla.instantiate(TINY | {"ckpt": str(tmp_path)}).state_dict()
    ours = stage.model.state_dict()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


TINY = {
    "target": "DiTDH",
    "params": {
        "input_size": 4, "patch_size": 1, "in_channels": 8, "hidden_size": [16, 24],
        "depth": [1, 1], "num_heads": [2, 2], "num_classes": 4,
    },
}  # fmt: skip


def test_a_checkpoint_without_a_decoder(tmp_path):
    save(tmp_path / "checkpoints", 10)
    with pytest.raises(UserError, match="holds no decoder"):
        export_decoder(tmp_path, tmp_path / "decoder.pt")


def test_a_results_folder_leads_to_its_checkpoints_wherever_they_are(tmp_path):
    save(tmp_path / "elsewhere", 10)
    results = tmp_path / "run"
    results.mkdir()
    (results / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path / 'elsewhere'}}}")
    for path in (results, tmp_path / "elsewhere", tmp_path / "elsewhere/step-00000010"):
        assert find_weights(path) == str(tmp_path / "elsewhere/step-00000010")


def test_files_of_an_older_version_still_give_weights(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        torch.save({"step": step, "ema": {}}, folder / f"step-{step:08d}.pt")
    assert open_weights(tmp_path)["step"] == 2
