"""Uploads: the real huggingface_hub client against a local fake hub."""

from __future__ import annotations

import pickle

import pytest
import torch
from fake_hub import point_at, serving
from huggingface_hub import constants
from safetensors.torch import save_file

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.interop.hub_push import prepare_upload, push

NAME = "owner/mine"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A folder of weights with hidden and unfinished files, and links."""
    folder = tmp_path / "model"
    (folder / "decoder").mkdir(parents=True)
    (folder / "config.json").write_text('{"target": "RAE"}')
    save_file({"weight": torch.arange(1000.0)}, folder / "decoder/model.safetensors")
    torch.save({"ema": {"weight": torch.ones(3)}}, folder / "stage2_model.pt")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / "later.pt.unfinished").write_bytes(b"\x00")
    (folder / "gone").symlink_to("nowhere")
    (folder / "other").symlink_to("decoder")
    return folder


UPLOADED = ("config.json", "decoder/model.safetensors", "stage2_model.pt")


def test_push_to_a_private_repository(hub, folder):
    upload = prepare_upload(folder)
    assert upload.files == UPLOADED
    assert upload.skipped == (".DS_Store", "gone", "later.pt.unfinished", "other")
    url = push(upload, NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.files == {name: (folder / name).read_bytes() for name in UPLOADED}
    assert url == f"{hub.url}/{NAME}/commit/{repository.commit}"
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_a_public_repository_needs_permission(hub, folder):
    hub.add(NAME, {}, private=False)
    with pytest.raises(UserError, match="--public"):
        push(prepare_upload(folder), NAME)
    assert hub.repositories[NAME].files == {}
    push(prepare_upload(folder), NAME, public=True)
    assert sorted(hub.repositories[NAME].files) == sorted(UPLOADED)


def test_uploads_are_verified(hub, folder, monkeypatch):
    monkeypatch.setattr(hub, "altered_uploads", True)
    with pytest.raises(UserError, match=r"decoder/model\.safetensors has another checksum"):
        push(prepare_upload(folder), NAME)


@pytest.mark.parametrize(
    ("status", "expected"), [(401, "hf auth login"), (403, "HF_TOKEN"), (500, "try again later")]
)
def test_refused_uploads(hub, folder, status, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.status = status
    with pytest.raises(UserError, match=expected):
        push(prepare_upload(folder), NAME)


def test_push_without_a_network(hub, folder, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the network"):
        push(prepare_upload(folder), NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        push(prepare_upload(folder), NAME)


def test_invalid_repository_name(folder):
    with pytest.raises(UserError, match="expected owner/name"):
        push(prepare_upload(folder), "mine")


class Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.pt", lambda p: torch.save({"model": {}, "optimizer": {"step": 1}}, p), "optimizer"),
        ("b.pt", lambda p: torch.save(Code(), p), "execute.* code"),
        ("c.pkl", lambda p: p.write_bytes(pickle.dumps(1)), "execute.* code"),
        ("d.pt", lambda p: p.write_bytes(b"truncated"), "not a file of tensors"),
        ("e.safetensors", lambda p: p.write_bytes(b"truncated"), "cannot be read as safetensors"),
        (
            "f.safetensors",
            lambda p: save_file({"optimizer.exp_avg": torch.ones(1)}, p),
            "optimizer state",
        ),
        ("g.yaml", lambda p: p.write_text("a: 1\ntoken: hf_" + 34 * "a"), "line 2, .*token"),
        ("h.txt", lambda p: p.write_text("WANDB_API_KEY=" + 40 * "a"), "key or password"),
        ("server.pem", lambda p: p.write_text("x"), "secret by its name"),
        ("step-00000010", lambda p: p.mkdir(), "training checkpoint"),
    ],
)
def test_refused_files(folder, name, write, expected, capsys):
    write(folder / name)
    with pytest.raises(UserError, match=expected) as error:
        prepare_upload(folder)
    assert name in str(error.value)
    assert "run" not in capsys.readouterr().out


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        prepare_upload(tmp_path / "none")
    with pytest.raises(UserError, match="no files"):
        prepare_upload(tmp_path)


def test_hub_push_command(hub, folder, capsys):
    assert main(["hub", "push", str(folder), NAME, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in UPLOADED)
    assert "would be uploaded" in output
    assert hub.requests == []
    assert main(["hub", "push", str(folder), NAME]) == 0
    assert "3 files" in capsys.readouterr().out
    assert main(["hub", "pull", NAME, "--to", str(folder.parent / "back")]) == 0
    assert "all checksums match" in capsys.readouterr().out
    for name in UPLOADED:
        assert (folder.parent / "back" / name).read_bytes() == (folder / name).read_bytes()
