"""Weights of a file, a checkpoint or a run; only the requested parts are read."""

import pytest
import torch
from checkpoint_cases import DiscTask, LinearTask, save

import rae_xla
from rae_xla.checkpoint.manager import BrokenCheckpointError
from rae_xla.checkpoint.tensors import CheckpointContent, find_weights, open_weights
from rae_xla.errors import UserError
from rae_xla.interop.layouts import export_decoder


def test_content_has_the_keys_of_a_published_file(tmp_path):
    task = DiscTask(seed=3)
    content = CheckpointContent(save(tmp_path, 10, task))
    assert set(content) == {
        "step", "config", "scheduler", "model", "ema", "optimizer", "disc", "disc_optimizer"
    }  # fmt: skip
    assert len(content) == 8
    assert content["step"] == 10
    assert content["scheduler"] == {"next_step": {"lr": 0.5}}
    ours, saved = task.model.state_dict(), content["ema"]
    assert {f"published.{name}" for name in ours} == saved.keys()
    assert all(torch.equal(ours[name], saved[f"published.{name}"]) for name in ours)
    assert set(content["optimizer"]) == {
        f"0.{name}/{moment}" for name in ("weight", "bias") for moment in ("exp_avg", "exp_avg_sq")
    }
    with pytest.raises(KeyError):
        content["decoder"]


def test_other_parts_may_be_broken(tmp_path):
    content = CheckpointContent(save(tmp_path, 10))
    for part in ("model", "optimizer"):
        path = tmp_path / f"step-00000010/{part}-0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "published.0.weight" in content["ema"]
    with pytest.raises(BrokenCheckpointError, match=r"model-0\.distcp .*checksum"):
        content["model"]


def test_a_run_refers_to_its_newest_checkpoint(tmp_path):
    save(tmp_path / "run/checkpoints", 10)
    save(tmp_path / "run/checkpoints", 20)
    for path in ("run", "run/checkpoints", "run/checkpoints/step-00000020"):
        assert find_weights(tmp_path / path) == str(tmp_path / "run/checkpoints/step-00000020")
        assert find_weights(f"{tmp_path / path}/").rstrip("/").endswith("step-00000020")
    assert find_weights(tmp_path / "file.pt") == str(tmp_path / "file.pt")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_weights(tmp_path)


def test_instantiate_loads_the_average_of_a_run(tmp_path, monkeypatch):
    class Published(LinearTask):
        def __init__(self):
            self.model = rae_xla.instantiate(TINY)

        def to_published_state_dict(self, state):
            return dict(state)

    task = Published()
    save(tmp_path / "checkpoints", 10, task)
    loaded = rae_xla.instantiate(TINY | {"ckpt": str(tmp_path)}).state_dict()
    ours = task.model.state_dict()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)


TINY = {
    "target": "DiTDH",
    "params": {
        "input_size": 4, "patch_size": 1, "in_channels": 8, "hidden_size": [16, 24],
        "depth": [1, 1], "num_heads": [2, 2], "num_classes": 4,
    },
}  # fmt: skip


def test_exporting_a_decoder_requires_one(tmp_path):
    save(tmp_path / "checkpoints", 10)
    with pytest.raises(UserError, match="holds no decoder"):
        export_decoder(tmp_path, tmp_path / "decoder.pt")


def test_a_results_folder_refers_to_its_checkpoint_dir(tmp_path):
    save(tmp_path / "elsewhere", 10)
    results = tmp_path / "run"
    results.mkdir()
    (results / "config.yaml").write_text(f"checkpoint: {{dir: {tmp_path / 'elsewhere'}}}")
    for path in (results, tmp_path / "elsewhere", tmp_path / "elsewhere/step-00000010"):
        assert find_weights(path) == str(tmp_path / "elsewhere/step-00000010")


def test_single_file_checkpoints_are_read(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        torch.save({"step": step, "ema": {}}, folder / f"step-{step:08d}.pt")
    assert open_weights(tmp_path)["step"] == 2
