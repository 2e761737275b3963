"""Downloads, by the real huggingface_hub client from a small hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, point_at, serving
from huggingface_hub import constants

from rae_xla.errors import UserError
from rae_xla.interop.hub import local_folder, pull, pull_files

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
    point_at(monkeypatch, "http://127.0.0.1:9")  # nobody listens there


def refusal(*arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        pull(*arguments, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert NAME in message or "owner/" in message
    return message


def whole_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_all_files_come(hub):
    snapshot = pull(NAME)
    assert whole_files(snapshot.folder) == FILES
    assert {f.path: f.size for f in snapshot.files} == {n: len(c) for n, c in FILES.items()}
    assert sorted(len(f.checksum) for f in snapshot.files) == [40, 40, 64]


def test_only_what_is_asked_for(hub):
    folder = local_folder(NAME, ["*.json"])
    assert whole_files(folder) == {"config.json": FILES["config.json"]}
    files = pull_files(NAME, ["weights/model.pt"])
    assert files["weights/model.pt"].read_bytes() == LARGE
    with pytest.raises(UserError, match=r"has no weights/other\.pt"):
        pull_files(NAME, ["weights/model.pt", "weights/other.pt"])
    assert "no file that matches *.bin" in refusal(NAME, ["*.bin"])


def test_into_a_folder(hub, tmp_path):
    snapshot = pull(NAME, to=tmp_path / "models")
    assert whole_files(tmp_path / "models") == FILES
    assert snapshot.size == sum(map(len, FILES.values()))


def test_a_local_path_is_taken_as_it_is(tmp_path, monkeypatch):
    unreachable(monkeypatch)
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path
    for absent in (tmp_path / "none", "./owner/name", str(tmp_path / "none")):
        with pytest.raises(UserError, match="there is no folder"):
            local_folder(absent)


@pytest.mark.parametrize("without", [offline, unreachable])
def test_the_cache_serves_without_a_network(hub, monkeypatch, without):
    folder = pull(NAME, ["*.json"]).folder
    without(monkeypatch)
    assert local_folder(NAME, ["*.json"]) == folder
    assert ("HF_HUB_OFFLINE" if without is offline else "check the network") in refusal(NAME)
    assert not (folder / "weights").exists()


def test_without_a_network_and_without_a_cache(hub, monkeypatch, tmp_path):
    unreachable(monkeypatch)
    assert "cannot be reached" in refusal(NAME)
    assert "cannot be reached" in refusal(NAME, to=tmp_path / "to")
    assert not (tmp_path / "to").exists()
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE forbids" in refusal(NAME)


def test_no_such_repository_or_revision(hub):
    message = refusal("owner/mdoel")
    assert "no repository owner/mdoel" in message
    assert "hf auth login" in message
    assert "no revision 'v2'" in refusal(NAME, revision="v2")


def test_a_gated_repository(hub):
    hub.repositories[NAME].gated = True
    message = refusal(NAME)
    assert f"{hub.url}/{NAME}" in message
    assert "gated" in message
    assert "hf auth login" in message


def test_a_hub_out_of_order(hub):
    hub.status = 503
    assert "HTTP 503" in refusal(NAME)
    hub.status = None
    assert whole_files(pull(NAME).folder) == FILES


@pytest.mark.parametrize("fault", ["short", "altered"])
@pytest.mark.parametrize("where", ["cache", "folder"])
def test_a_damaged_download_is_named_and_the_next_one_whole(hub, tmp_path, fault, where):
    to = tmp_path / "to" if where == "folder" else None
    hub.faults["weights/model.pt"] = fault
    message = refusal(NAME, to=to)
    assert ("cut short" if fault == "short" else "damaged") in message
    assert "model.pt" in message
    root = to or tmp_path / "cache"
    assert not [p for p in root.rglob("model.pt") if p.exists()]
    hub.faults.clear()
    assert whole_files(pull(NAME, to=to).folder) == FILES


def test_a_connection_that_breaks(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.faults["weights/model.pt"] = "dropped"
    assert "cut short" in refusal(NAME)
    hub.faults.clear()
    assert whole_files(pull(NAME).folder) == FILES


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_file_that_was_damaged_in_the_cache(hub, monkeypatch, damage):
    place = pull(NAME).folder / "weights/model.pt"
    blob = place.resolve()
    blob.write_bytes(LARGE[:-100] if damage == "cut" else LARGE[:-1] + b"!")
    offline(monkeypatch)
    assert "weights/model.pt" in refusal(NAME)
    assert not blob.exists()
    monkeypatch.undo()


def test_what_was_checked_is_not_read_again(hub, monkeypatch):
    pull(NAME)
    monkeypatch.setattr("rae_xla.interop.hub.checksum", lambda *_: pytest.fail("read again"))
    pull(NAME)


def test_a_cache_on_a_disk_without_links(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.faults["weights/model.pt"] = "altered"
    assert "weights/model.pt" in refusal(NAME)
    hub.faults.clear()
    snapshot = pull(NAME)
    assert whole_files(snapshot.folder) == FILES
    assert not any(path.is_symlink() for path in snapshot.folder.rglob("*"))
    assert all(file.checksum for file in snapshot.files)
    offline(monkeypatch)
    assert not any(file.checksum for file in pull(NAME).files)  # and it serves all the same


@pytest.mark.slow  # a process of its own, because the hub's client reads the environment once
def test_endpoint_of_the_environment(tmp_path):
    code = "from rae_xla.interop.hub import pull; print(pull('owner/model').size)"
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
