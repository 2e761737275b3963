"""The results folder: which run owns it, and the lock of an active run."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from checkpoint_cases import save

from rae_xla.config import RunConfig, load_config
from rae_xla.config.schema import MeshConfig, RuntimeConfig
from rae_xla.data.class_names import recorded_class_names
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.train.results_folder import RUNNING_FILE, check_folder, claim_folder, hold_folder

CONFIG = RunConfig()
HOLDER = """
import sys
from pathlib import Path
from rae_xla.config.schema import MeshConfig, RuntimeConfig
from rae_xla.runtime import start
from rae_xla.train.results_folder import hold_folder
with hold_folder(Path(sys.argv[1]), start(RuntimeConfig(backend="torch"), MeshConfig())):
    print("locked", flush=True)
    sys.stdin.read()
"""


def other(**changes):
    return replace(CONFIG, training=replace(CONFIG.training, **changes))


def test_it_is_created_and_describes_the_run(tmp_path):
    claim_folder(tmp_path / "new/run", CONFIG, "data")
    assert load_config(str(tmp_path / "new/run/config.yaml")).diff(CONFIG) == []
    assert (tmp_path / "new/run/data.txt").read_text() == "data\n"


def test_class_names_are_kept_unless_they_are_numbers_of_imagenet(tmp_path):
    claim_folder(tmp_path / "imagenet", CONFIG, "data", [str(label) for label in range(1000)])
    assert recorded_class_names(tmp_path / "imagenet") is None
    claim_folder(tmp_path / "digits", CONFIG, "data", ["0", "1", "2"])
    assert recorded_class_names(tmp_path / "digits") == ("0", "1", "2")
    claim_folder(tmp_path / "shapes", CONFIG, "data", ["circle", "square"])
    assert recorded_class_names(tmp_path / "shapes") == ("circle", "square")


def test_without_checkpoints_it_may_be_taken_over(tmp_path):
    claim_folder(tmp_path, CONFIG, "data")
    claim_folder(tmp_path, other(global_seed=1), "other data")


@pytest.mark.parametrize("lost", [False, True], ids=["", "results lost"])
def test_checkpoints_belong_to_one_configuration_and_data_set(tmp_path, lost):
    claim_folder(tmp_path, CONFIG, "data")
    save(tmp_path / "checkpoints", 10)
    if lost:
        for name in ("config.yaml", "data.txt"):
            (tmp_path / name).unlink()
    claim_folder(tmp_path, other(max_skipped=3), "data")  # does not affect the result
    with pytest.raises(UserError, match=r"another configuration.*global_seed: 0 -> 1"):
        claim_folder(tmp_path, other(global_seed=1), "data")
    with pytest.raises(UserError, match=r"other training data.*another --results-dir"):
        claim_folder(tmp_path, CONFIG, "other data")
    never = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, resume=False))
    with pytest.raises(UserError, match=r"checkpoint\.resume is false"):
        claim_folder(tmp_path, never, "data")


def test_a_damaged_manifest_is_skipped(tmp_path):
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints/step-00000020/manifest.json").write_text("{")
    claim_folder(tmp_path, CONFIG, "data")
    with pytest.raises(UserError, match="another configuration"):
        claim_folder(tmp_path, other(global_seed=1), "data")


def test_checkpoints_in_another_folder_count(tmp_path):
    save(tmp_path / "elsewhere", 10)
    place = replace(CONFIG.checkpoint, dir=str(tmp_path / "elsewhere"))
    claim_folder(tmp_path / "run", replace(CONFIG, checkpoint=place), "data")
    with pytest.raises(UserError, match=r"elsewhere has.*another checkpoint\.dir"):
        claim_folder(tmp_path / "run", replace(CONFIG, checkpoint=place), "other data")


def test_checkpoints_of_an_older_version_are_not_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000010.pt").touch()
    with pytest.raises(UserError, match=r"older version.*step-00000010\.pt"):
        claim_folder(tmp_path, CONFIG, "data")


def test_numbers_survive_the_manifest(tmp_path):
    """YAML 1.1 parses 1e-08, as JSON writes it, as a string."""
    small = other(optimizer=replace(CONFIG.training.optimizer, eps=1e-8), skip_grad_norm=1e22)
    save(tmp_path / "checkpoints", 10)
    manifest = json.loads((tmp_path / "checkpoints/step-00000010/manifest.json").read_text())
    manifest["config"] = small.to_dict()
    (tmp_path / "checkpoints/step-00000010/manifest.json").write_text(json.dumps(manifest))
    claim_folder(tmp_path, small, "data")


def test_an_active_run_locks_the_folder(tmp_path):
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=-1, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "locked\n"
        who = rf"active in .*\(process {run.pid} on .*, since 20.*another --results-dir"
        with pytest.raises(UserError, match=who):
            check_folder(tmp_path, CONFIG, "data")
        with pytest.raises(UserError, match=who), hold_folder(tmp_path, backend):
            raise AssertionError
        run.kill()
    check_folder(tmp_path, CONFIG, "data")
    for _ in range(2):  # the lock ends with the context, too
        with hold_folder(tmp_path, backend):
            text = (tmp_path / RUNNING_FILE).read_text()
            assert text.startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())
    with (
        pytest.raises(UserError, match="cannot write to the results folder"),
        hold_folder(tmp_path / "file/run", backend),
    ):
        raise AssertionError
