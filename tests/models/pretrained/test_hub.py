"""Downloads: the real huggingface_hub client against a local fake hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, point_at, serving
from huggingface_hub import constants

from rae_xla.errors import UserError
from rae_xla.models.pretrained.hub import local_folder, pull, pull_files

LARGE = bytes(range(256)) * 40
FILES = {"config.json": b'{"a": 1}', "weights/model.pt": LARGE, "README.md": b"# A model\n"}
NAME = "owner/model"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(monkeypatch, tmp_path) as hub:
        hub.add(NAME, FILES)
        yield hub


def offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(monkeypatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9")  # a port that no server listens on


def pull_error(*arguments, **settings) -> str:
    """Return the message of the error that ``pull`` raises."""
    with pytest.raises(UserError) as error:
        pull(*arguments, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert NAME in message or "owner/" in message
    return message


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_pull_downloads_all_files(hub):
    snapshot = pull(NAME)
    assert files_in(snapshot.folder) == FILES
    assert {f.path: f.size for f in snapshot.files} == {n: len(c) for n, c in FILES.items()}
    assert sorted(len(f.checksum) for f in snapshot.files) == [40, 40, 64]


def test_pull_downloads_only_matching_files(hub):
    folder = local_folder(NAME, ["*.json"])
    assert files_in(folder) == {"config.json": FILES["config.json"]}
    files = pull_files(NAME, ["weights/model.pt"])
    assert files["weights/model.pt"].read_bytes() == LARGE
    with pytest.raises(UserError, match=r"has no weights/other\.pt"):
        pull_files(NAME, ["weights/model.pt", "weights/other.pt"])
    assert "no file that matches *.bin" in pull_error(NAME, ["*.bin"])


def test_pull_into_a_folder(hub, tmp_path):
    snapshot = pull(NAME, to=tmp_path / "models")
    assert files_in(tmp_path / "models") == FILES
    assert snapshot.size == sum(map(len, FILES.values()))


def test_local_paths_are_not_downloaded(tmp_path, monkeypatch):
    unreachable(monkeypatch)
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path
    for absent in (tmp_path / "none", "./owner/name", str(tmp_path / "none")):
        with pytest.raises(UserError, match="there is no folder"):
            local_folder(absent)


@pytest.mark.parametrize("disconnect", [offline, unreachable])
def test_the_cache_is_used_offline(hub, monkeypatch, disconnect):
    folder = pull(NAME, ["*.json"]).folder
    disconnect(monkeypatch)
    assert local_folder(NAME, ["*.json"]) == folder
    assert ("HF_HUB_OFFLINE" if disconnect is offline else "check the network") in pull_error(NAME)
    assert not (folder / "weights").exists()


def test_offline_with_an_empty_cache(hub, monkeypatch, tmp_path):
    unreachable(monkeypatch)
    assert "cannot be reached" in pull_error(NAME)
    assert "cannot be reached" in pull_error(NAME, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE forbids" in pull_error(NAME)


def test_unknown_repository_or_revision(hub):
    message = pull_error("owner/mdoel")
    assert "no repository owner/mdoel" in message
    assert "hf auth login" in message
    assert "no revision 'v2'" in pull_error(NAME, revision="v2")


def test_gated_repository(hub):
    hub.repositories[NAME].gated = True
    message = pull_error(NAME)
    assert f"{hub.url}/{NAME}" in message
    assert "gated" in message
    assert "hf auth login" in message


def test_server_error(hub):
    hub.status = 503
    assert "HTTP 503" in pull_error(NAME)
    hub.status = None
    assert files_in(pull(NAME).folder) == FILES


@pytest.mark.parametrize("fault", ["short", "altered"])
@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_damaged_download_is_removed_and_repeated(hub, tmp_path, fault, where):
    to = tmp_path / "to" if where == "folder" else None
    hub.faults["weights/model.pt"] = fault
    message = pull_error(NAME, to=to)
    assert ("interrupted" if fault == "short" else "damaged") in message
    assert "model.pt" in message
    root = to or tmp_path / "cache"
    assert not [p for p in root.rglob("model.pt") if p.exists()]
    hub.faults.clear()
    assert files_in(pull(NAME, to=to).folder) == FILES


def test_a_dropped_connection(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.faults["weights/model.pt"] = "dropped"
    assert "interrupted" in pull_error(NAME)
    hub.faults.clear()
    assert files_in(pull(NAME).folder) == FILES


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_file_in_the_cache(hub, monkeypatch, damage):
    file = pull(NAME).folder / "weights/model.pt"
    blob = file.resolve()
    blob.write_bytes(LARGE[:-100] if damage == "cut" else LARGE[:-1] + b"!")
    offline(monkeypatch)
    assert "weights/model.pt" in pull_error(NAME)
    assert not blob.exists()
    monkeypatch.undo()


def test_a_verified_file_is_not_read_again(hub, monkeypatch):
    pull(NAME)
    monkeypatch.setattr(
        "rae_xla.models.pretrained.hub.checksum", lambda *_: pytest.fail("read again")
    )
    pull(NAME)


def test_a_cache_without_symbolic_links(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.faults["weights/model.pt"] = "altered"
    assert "weights/model.pt" in pull_error(NAME)
    hub.faults.clear()
    snapshot = pull(NAME)
    assert files_in(snapshot.folder) == FILES
    assert not any(path.is_symlink() for path in snapshot.folder.rglob("*"))
    assert all(file.checksum for file in snapshot.files)
    offline(monkeypatch)
    assert not any(file.checksum for file in pull(NAME).files)  # still used, unverified


@pytest.mark.slow  # in a subprocess, because huggingface_hub reads the environment once
def test_hf_endpoint(tmp_path):
    code = "from rae_xla.models.pretrained.hub import pull; print(pull('owner/model').size)"
    with FakeHub() as hub:
        hub.add(NAME, FILES)
        settings = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.url}
        settings["HF_HUB_OFFLINE"] = "0"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=True,
        )
    assert int(done.stdout) == sum(map(len, FILES.values()))
