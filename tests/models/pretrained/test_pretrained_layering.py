"""``from_pretrained`` needs nothing above ``models``; ``rae_xla.interop`` adds checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LinearTask, save
from golden_case import load_case

from rae_xla import DiTDH
from rae_xla.errors import UserError
from rae_xla.models.pretrained import weight_files
from rae_xla.models.pretrained.weight_files import WeightsReader, register_reader

TINY = {
    "input_size": 4, "in_channels": 8, "hidden_size": [16, 24], "depth": [1, 1],
    "num_heads": [2, 2], "num_classes": 5,
}  # fmt: skip


def test_imports_of_a_new_process() -> None:
    """One subprocess for three checks, because importing torch takes seconds."""
    code = """
import sys
import rae_xla
print("torch" in sys.modules)
import rae_xla.models.rae, rae_xla.models.dit, rae_xla.models.dit_dh
upper = ("config", "storage", "checkpoint", "interop", "runtime", "data")
print([m for m in sys.modules if m.startswith(tuple(f"rae_xla.{name}" for name in upper))])
from rae_xla import LightningDiT
print(list(sys.modules["rae_xla.models.pretrained.weight_files"]._READERS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imports_torch, upper_layers, readers = done.stdout.splitlines()
    assert imports_torch == "False"
    assert upper_layers == "[]"
    assert readers == "['checkpoint']"


class TransformerTask(LinearTask):
    """Trains a tiny diffusion transformer."""

    def __init__(self) -> None:
        self.model = DiTDH(**TINY)

    def to_published_state_dict(self, state):
        return state


def test_a_results_folder(tmp_path: Path) -> None:
    task = TransformerTask()
    save(tmp_path / "checkpoints", 10, task)
    model = DiTDH.from_pretrained(tmp_path)
    assert model.settings | {"class_dropout_prob": 0.1} == task.model.settings
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_without_a_reader_the_error_names_the_import(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(weight_files, "_READERS", {})
    for name in (tmp_path, "gs://bucket/run"):
        with pytest.raises(UserError, match=r"import rae_xla\.interop"):
            DiTDH.from_pretrained(name)


def test_a_registered_reader(monkeypatch) -> None:
    monkeypatch.setattr(weight_files, "_READERS", {})
    case = load_case("stage2/ddt_a_published")
    state = case.under("state")
    content = {"config": {"stage_2": {"target": "DiTDH", "params": case.meta["config"]}}}
    content |= {"step": 3, "model": state, "ema": state}
    reader = WeightsReader(lambda name: name.startswith("db://"), lambda name: (name, content))
    register_reader("database", reader)
    model = DiTDH.from_pretrained("db://weights")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
