"""Results folders in a bucket: from training to `generate` and `report`, and who may write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rae_xla import storage
from rae_xla.cli.main import main
from rae_xla.config import RunConfig
from rae_xla.errors import UserError
from rae_xla.sample.tiny_model import write_tiny_model
from rae_xla.train import remote_results
from rae_xla.train.remote_results import MARK_FILE, Mark
from rae_xla.train.remote_results import remote_results as open_remote
from rae_xla.train.results_folder import check_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(gcs, request, monkeypatch) -> str:
    monkeypatch.setattr(remote_results, "MIN_PAUSE", 0.01)
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "2")
    return f"gs://shards/{request.node.name}/run"


def write_mark(folder: str, **changes: object) -> None:
    mark = Mark(folder)
    mark._content.update(changes)
    mark._write()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Return the folder of a tiny model's config.yaml and of shards."""
    place = tmp_path_factory.mktemp("tiny")
    write_tiny_model(place)
    pixels = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    np.savez(place / "d.npz", images=pixels, labels=np.arange(16) % 2)
    assert main(["shards", "make", str(place / "d.npz"), str(place / "shards")]) == 0
    return place


def run(folder: str, then: Callable[[], object], working: list[Path]) -> None:
    """Write the file ``a`` in a run, then call ``then``; append the working folder to a list."""
    with open_remote(folder, 0, None) as results:
        working.append(results.working)
        (results.working / "a").write_text("2")
        then()


def train(tiny: Path, folder: str, *settings: str) -> list[str]:
    return [
        "train", "stage2", "--config", str(tiny / "config.yaml"), "--results-dir", folder,
        f"data.train={tiny}/shards", "runtime.backend=torch", "stage_2.ckpt=null",
        "training.global_batch_size=8", "training.log_every=1", "training.sample_every=2",
        *settings,
    ]  # fmt: skip


def steps(folder: str) -> list[int]:
    lines = storage.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_training_resuming_sampling_and_reporting(tiny, folder, tmp_path, monkeypatch, capsys):
    """Everything that a user does with a results folder works where the run was, and elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert main(train(tiny, folder, "training.steps=2")) == 0
    assert steps(folder) == [1, 2]
    assert main(train(tiny, folder, "training.steps=3")) == 0, "another start, with no local files"
    assert steps(folder) == [1, 2, 3]
    assert set(storage.list_files(folder)) == {
        "classes.json", "config.yaml", "data.txt", "environment.jsonl", "metrics.jsonl",
    }  # fmt: skip
    assert len(storage.read_bytes(f"{folder}/environment.jsonl").splitlines()) == 2
    assert set(storage.list_folders(folder)) == {"checkpoints", "samples"}
    names = ["stage2-00000000.png", "stage2-00000002.png", "stage2-00000003.png"]
    assert sorted(storage.list_files(f"{folder}/samples")) == names

    assert main(train(tiny, folder, "training.steps=3", "training.global_seed=1")) == 2
    assert "another configuration (training.global_seed: 0 -> 1)" in capsys.readouterr().err

    assert main(["checkpoints", "list", folder]) == 0
    out = f"{folder}-images"
    named = ["--classes", "1"]  # the name of a class of this data, which ImageNet does not have
    generate = ["generate", "--model", folder, "--out", out, "--num-samples", "2", *named]
    assert main([*generate, "--num-steps", "3", "runtime.backend=torch"]) == 0
    assert {"generated.json", "grid.png"} < set(storage.list_files(out))
    assert main([*generate, "--num-steps", "2", "runtime.backend=torch"]) == 0, "it is replaced"
    assert len(storage.list_files(out)) == 4

    assert main(["report", folder]) == 0
    page = storage.read_bytes(f"{folder}/report.html").decode()
    assert "train/loss" in page
    assert page.count("data:image/") == 3
    assert main(["report", folder, "--out", "here.html"]) == 0
    assert os.listdir() == ["here.html"], "nothing else was written to the working directory"


@pytest.mark.parametrize("layout", ["flat", "folders", "tar"])
def test_sample_sets(tiny, folder, layout, monkeypatch):
    command = [
        "sample", "--config", str(tiny / "config.yaml"), "--out", folder, "--layout", layout,
        "--labels", "0,1", "--num-samples", "4", "sampler.params.num_steps=3",
        "runtime.backend=torch",
    ]  # fmt: skip
    assert main(command) == 0
    files = storage.list_files(folder)
    assert {"settings.json", "samples.npz", "grid.png"} <= set(files)
    assert {
        "flat": "000003.png" in files,
        "folders": set(storage.list_files(f"{folder}/000")) == {f"00000{i}.png" for i in range(4)},
        "tar": "000.tar" in files and not storage.list_files(f"{folder}/000"),
    }[layout]
    with storage.open_read(f"{folder}/samples.npz") as file:
        content = file.read()
    storage.remove(f"{folder}/samples.npz")
    storage.remove(f"{folder}/grid.png")
    assert main(command) == 0, "only what is missing is written again"
    assert storage.read_bytes(f"{folder}/samples.npz")[:200] == content[:200]


def test_latents_need_a_local_folder(tiny, folder, capsys):
    command = ["sample", "--config", str(tiny / "config.yaml"), "--out", folder, "--keep-latents"]
    assert main(command) == 2
    assert "give a local --out" in capsys.readouterr().err


def test_a_killed_run_is_resumed_with_its_lines(tiny, folder):
    """A run that is killed has uploaded its lines up to a few seconds before."""
    command = train(tiny, folder, "training.steps=100000", "checkpoint.every_steps=5")
    with subprocess.Popen([sys.executable, "-m", "rae_xla", *command], stderr=-3) as run:
        deadline = time.monotonic() + 120
        while not storage.exists(f"{folder}/metrics.jsonl") or len(steps(folder)) < 10:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with pytest.raises(UserError, match=rf"another run is active in .*process {run.pid} on "):
            Mark(folder).claim()
        run.kill()
    before = steps(folder)
    last = max(int(name[5:]) for name in storage.list_folders(f"{folder}/checkpoints"))
    assert main(train(tiny, folder, f"training.steps={last + 2}", "checkpoint.every_steps=5")) == 0
    found = steps(folder)
    assert found == sorted(set(found)), "every step at most once"
    assert set(found) >= {s for s in before if s <= last}
    assert found[-2:] == [last + 1, last + 2]
    assert MARK_FILE not in storage.list_files(folder)


def test_a_run_of_another_host(folder, monkeypatch):
    monkeypatch.setattr(remote_results, "LEASE", 1.0)
    write_mark(folder, host="elsewhere", renewed=0)
    Mark(folder).claim()  # nothing renews it
    write_mark(folder, host="elsewhere", renewed=1)
    timer = threading.Timer(0.3, write_mark, (folder,), {"host": "elsewhere", "renewed": 2})
    timer.start()
    with pytest.raises(UserError, match=r"another run is active in .* on elsewhere"):
        Mark(folder).claim()
    timer.join()
    timer = threading.Timer(0.3, storage.remove, (f"{folder}/{MARK_FILE}",))
    timer.start()
    mark = Mark(folder)
    mark.claim()  # the other one ended
    timer.join()
    mark.renew()
    other = Mark(folder)
    other._write()
    with pytest.raises(UserError, match="has taken"):
        mark.renew()
    mark.release()
    assert storage.exists(f"{folder}/{MARK_FILE}"), "the mark of the other run stays"
    other.release()
    assert not storage.exists(f"{folder}/{MARK_FILE}")


def test_a_process_of_this_host_that_ended_does_not_hold_the_folder(folder):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    write_mark(folder, pid=int(done.stdout), started="boot 1")
    check_folder(folder, RunConfig(), "data")
    Mark(folder).claim()


def test_processes_upload_their_own_files(folder):
    names = {
        0: {"config.yaml", "metrics.jsonl", "bad_samples.jsonl", "hang-0.txt", "samples/a.png"},
        1: {"bad_samples.1.jsonl", "hang-1.txt"},
    }
    for process in (0, 1):
        with open_remote(folder, process, None) as results:
            for name in (*names[0], *names[1]):
                file = results.working / name
                file.parent.mkdir(exist_ok=True)
                if name in names[process] or name == "config.yaml":
                    file.write_text(f"{process}")
            assert results.working.name == "run", "wandb calls the run by this name"
        assert not results.working.exists()
    written = {n: storage.read_bytes(f"{folder}/{n}") for n in names[0] | names[1]}
    assert written == {n: b"0" if n in names[0] else b"1" for n in written}
    with open_remote(folder, 1, None) as results:
        assert {p.name for p in results.working.iterdir()} == names[1]
    with open_remote(folder, 0, None) as results:
        assert {p.name for p in results.working.iterdir()} == {n for n in names[0] if "/" not in n}


def test_wandb_files_and_unfinished_files(folder):
    with open_remote(folder, 0, None) as results:
        (results.working / "wandb").mkdir()
        (results.working / "wandb/run.wandb").write_text("x")
        (results.working / "a.unfinished").write_text("x")
        (results.working / "b").write_text("x")
        results.upload()
        assert storage.list_files(folder).keys() == {"b"}
        assert storage.list_folders(folder) == []
    assert storage.list_files(folder).keys() == {"b"}
    assert storage.list_files(f"{folder}/wandb").keys() == {"run.wandb"}


def test_an_unreachable_bucket_does_not_end_a_run(folder, gcs, monkeypatch, caplog):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "0.1")
    monkeypatch.setattr(remote_results, "RENEWAL", 0.05)
    try:
        with open_remote(folder, 0, None) as results:
            gcs.inject(match="upload", kind="503")
            (results.working / "a").write_text("1")
            results.request()
            deadline = time.monotonic() + 30
            while "the upload is repeated" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            gcs.clear_faults()
        assert storage.read_bytes(f"{folder}/a") == b"1"
        kept: list[Path] = []
        with pytest.raises(UserError, match=r"cannot be uploaded to .*They are in .*/run") as error:
            run(folder, lambda: gcs.inject(match="upload", kind="503"), kept)
        assert str(kept[0]) in str(error.value)
        assert (kept[0] / "a").read_text() == "2", "the results are kept"
    finally:
        gcs.clear_faults()


def test_the_results_of_a_failed_run_are_uploaded_and_kept(folder):
    def fail() -> None:
        raise RuntimeError

    kept: list[Path] = []
    with pytest.raises(RuntimeError):
        run(folder, fail, kept)
    assert storage.read_bytes(f"{folder}/a") == b"2"
    assert (kept[0] / "a").exists(), "messages of the run refer to it"


def test_a_missing_bucket_is_reported_before_anything_is_computed(tiny, gcs, capsys, monkeypatch):
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "2")
    assert main(train(tiny, "gs://missing-bucket/run")) != 0
    error = capsys.readouterr().err
    assert "cannot write to the results folder gs://missing-bucket/run" in error
    assert "there is no bucket 'missing-bucket'" in error
