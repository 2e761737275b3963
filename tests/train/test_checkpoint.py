"""Checkpoints are whole or absent."""

import pytest
import torch

from rae_xla.train.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

CONTENT = {"step": 1, "model": {"w": torch.ones(2)}, "ema": {}, "optimizer": {}}


def test_saved_listed_loaded_and_pruned(tmp_path):
    for step in (1, 2, 10, 20):
        save_checkpoint(tmp_path, step, CONTENT | {"step": step}, keep_last=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (10, 20)]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 20)
    loaded = load_checkpoint(checkpoint_path(tmp_path, 20))
    assert loaded["step"] == 20
    torch.testing.assert_close(loaded["model"], CONTENT["model"])


def test_a_write_that_fails_leaves_the_checkpoints_there_were(tmp_path):
    save_checkpoint(tmp_path, 1, CONTENT, keep_last=1)
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path, 2, CONTENT | {"model": lambda: None}, keep_last=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_what_a_kill_leaves_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, CONTENT, keep_last=3)
    (tmp_path / "checkpoints" / "step-00000002.pt.unfinished").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


def test_a_damaged_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, CONTENT, keep_last=3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-00000001\.pt cannot be read"):
        load_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no training checkpoint: it has no ema, model"):
        load_checkpoint(tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)
