"""Uploads, by the real huggingface_hub client to a small hub on this machine."""

from __future__ import annotations

import pickle

import pytest
import torch
from fake_hub import point_at, serving
from huggingface_hub import constants
from safetensors.torch import save_file

from rae_xla.cli.main import main
from rae_xla.errors import UserError
from rae_xla.interop.hub_push import pack, push

NAME = "owner/mine"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    """What save_pretrained leaves, and what a desktop leaves beside it."""
    folder = tmp_path / "model"
    (folder / "decoder").mkdir(parents=True)
    (folder / "config.json").write_text('{"target": "RAE"}')
    save_file({"weight": torch.arange(1000.0)}, folder / "decoder/model.safetensors")
    torch.save({"ema": {"weight": torch.ones(3)}}, folder / "stage2_model.pt")
    (folder / ".DS_Store").write_bytes(b"\x00")
    (folder / "later.pt.unfinished").write_bytes(b"\x00")
    return folder


SENT = ("config.json", "decoder/model.safetensors", "stage2_model.pt")


def test_a_push_arrives_whole_and_private(hub, folder):
    parcel = pack(folder)
    assert parcel.files == SENT
    assert parcel.left_out == (".DS_Store", "later.pt.unfinished")
    address = push(parcel, NAME)
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.files == {name: (folder / name).read_bytes() for name in SENT}
    assert address == f"{hub.url}/{NAME}/commit/{repository.commit}"
    assert sum("/commit/" in request for request in hub.requests) == 1


def test_a_public_repository_is_not_written_by_accident(hub, folder):
    hub.add(NAME, {}, private=False)
    with pytest.raises(UserError, match="say --public"):
        push(pack(folder), NAME)
    assert hub.repositories[NAME].files == {}
    push(pack(folder), NAME, public=True)
    assert sorted(hub.repositories[NAME].files) == sorted(SENT)


def test_what_arrives_altered_is_found(hub, folder, monkeypatch):
    monkeypatch.setattr(hub, "altered_uploads", True)
    with pytest.raises(UserError, match=r"decoder/model\.safetensors arrived .* another checksum"):
        push(pack(folder), NAME)


@pytest.mark.parametrize(
    ("status", "expected"), [(401, "hf auth login"), (403, "HF_TOKEN"), (500, "try again later")]
)
def test_a_hub_that_refuses(hub, folder, status, expected, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.status = status
    with pytest.raises(UserError, match=expected):
        push(pack(folder), NAME)


def test_no_network(hub, folder, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="check the network"):
        push(pack(folder), NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        push(pack(folder), NAME)


def test_no_id(folder):
    with pytest.raises(UserError, match="expected owner/name"):
        push(pack(folder), "mine")


class Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.pt", lambda p: torch.save({"model": {}, "optimizer": {"step": 1}}, p), "optimizer"),
        ("b.pt", lambda p: torch.save(Code(), p), "runs code"),
        ("c.pkl", lambda p: p.write_bytes(pickle.dumps(1)), "runs code"),
        ("d.pt", lambda p: p.write_bytes(b"cut short"), "no file of tensors"),
        ("e.safetensors", lambda p: p.write_bytes(b"cut short"), "cannot be read as safetensors"),
        (
            "f.safetensors",
            lambda p: save_file({"optimizer.exp_avg": torch.ones(1)}, p),
            "state of an optimizer",
        ),
        ("g.yaml", lambda p: p.write_text("a: 1\ntoken: hf_" + 34 * "a"), "line 2, .*token"),
        ("h.txt", lambda p: p.write_text("WANDB_API_KEY=" + 40 * "a"), "key or password"),
        ("server.pem", lambda p: p.write_text("x"), "secret by its name"),
        ("step-00000010", lambda p: p.mkdir(), "training checkpoint"),
    ],
)
def test_what_must_not_be_sent(folder, name, write, expected, capsys):
    write(folder / name)
    with pytest.raises(UserError, match=expected) as error:
        pack(folder)
    assert name in str(error.value)
    assert "run" not in capsys.readouterr().out


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        pack(tmp_path / "none")
    with pytest.raises(UserError, match="no files"):
        pack(tmp_path)


def test_the_command(hub, folder, capsys):
    assert main(["hub", "push", str(folder), NAME, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SENT)
    assert "would be sent" in said
    assert hub.requests == []
    assert main(["hub", "push", str(folder), NAME]) == 0
    assert "3 files" in capsys.readouterr().out
    assert main(["hub", "pull", NAME, "--to", str(folder.parent / "back")]) == 0
    assert "every checksum is the hub's" in capsys.readouterr().out
    for name in SENT:
        assert (folder.parent / "back" / name).read_bytes() == (folder / name).read_bytes()
