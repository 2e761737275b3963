"""``rae-xla doctor`` as a command."""

import json

import pytest
from tiny import make_configs, make_shards, rae_xla

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return make_configs(folder, make_shards(folder))["stage2"]


@pytest.fixture(autouse=True)
def no_emulator(monkeypatch):
    """Other tests of this process may run an emulator."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)


@pytest.mark.slow
def test_a_valid_run_passes(config, tmp_path):
    done = rae_xla("doctor", "--config", config, "--results-dir", tmp_path / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("data.train: ", "matmul: ", "torch: ", "checkpoints: ", "wandb: "):
        assert line in done.stdout
    assert done.stdout.endswith("what to fix\n  nothing\n")
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_run_fails(config, tmp_path):
    done = rae_xla("doctor", "--config", config, "--json", f"data.train={tmp_path}/none",
                   "mesh.ici.fsdp=3")  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["ok"] is False
    failed = {f["section"] for f in content["findings"] if f["status"] == "FAIL"}
    assert failed == {"data", "devices"}
    assert len(content["fix"]) == 2
