"""A folder of weights to the hub: what may be sent, and that it arrived.

Everything is looked at before anything is sent, and it is sent as one commit. Optimizer state,
files that run code when they are read, and what looks like a password or a key are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.interop.hub import checksum, hub_checksums
from rae_xla.interop.hub_errors import explained
from rae_xla.models.hf_folder import is_hub_id

_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
_LEFT_OUT = ("*.unfinished", "*.incomplete", "__pycache__")
_OPTIMIZER = re.compile(r"(optimi[sz]ers?|opt|scheduler|exp_avg(_sq)?)(_states?)?(_dict)?([./]|$)")
_SECRET_NAMES = ("*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "*credentials*", "*.keystore")
_SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a Google API key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}"),
    "a key or password": re.compile(
        r"(?i)\b\w*(api_?key|secret|password|access_?token)[\"']?\s*[=:]\s*[\"']?[\w+/-]{16,}"
    ),
}
_TEXT_LIMIT = 4 << 20  # bytes: a larger text file is data


@dataclass(frozen=True)
class Parcel:
    """What a push sends: files of a folder by their paths in it, and what it leaves out."""

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return (self.folder / path).stat().st_size


def pack(folder: Path) -> Parcel:
    """Look at a folder that is to be sent. Hidden and unfinished files stay here.

    Raises:
        UserError: there is no such folder, nothing in it, or something that must not be sent.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that save_pretrained wrote")
    _refuse_runs(folder)
    files: list[str] = []
    left_out: list[str] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        rests = any(fnmatch(part, pattern) for part in parts for pattern in _LEFT_OUT)
        (left_out if hidden or rests else files).append("/".join(parts))
    if not files:
        raise UserError(f"{folder} has no files to send")
    for name in files:
        _refuse_secrets(folder / name)
        _refuse_optimizer_and_code(folder / name)
    return Parcel(folder, tuple(files), tuple(left_out))


def push(parcel: Parcel, repository: str, *, public: bool = False, message: str = "") -> str:
    """Send a parcel as one commit to a repository, which is made, private, if there is none.

    Returns:
        The commit's address.

    Raises:
        UserError: no network, no right to, a public repository without ``public``, or files that
            arrived with another checksum.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not is_hub_id(repository):
        raise UserError(f"{repository!r} is no hub id: expected owner/name")
    additions = [CommitOperationAdd(name, parcel.folder / name) for name in parcel.files]
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise UserError(
                f"{repository} is public, so that everyone could read these files: say --public "
                "if they may, or give another name"
            )
        commit = api.create_commit(
            repository, additions, commit_message=message or f"{parcel.folder.name} by rae-xla"
        )
        arrived = hub_checksums(repository, commit.oid)
    except UserError:
        raise
    except Exception as error:  # as when pulling
        raise explained(error, repository, pushing=True) from error
    for name in parcel.files:
        expected = arrived.get(name, "")
        if checksum(parcel.folder / name, expected) != expected:
            raise UserError(
                f"{name} arrived at {repository} with another checksum than it has here: push again"
            )
    return str(commit.commit_url)


def _refuse_runs(folder: Path) -> None:
    """Sharded checkpoints hold the optimizer; their weights can be had as one file."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and re.fullmatch(r"step-\d{8,}(\.unfinished)?", path.name):
            raise UserError(
                f"{path} is a training checkpoint, with the state of its optimizer: send its "
                f"weights alone, from `rae-xla checkpoints export {folder} --weights-only --out "
                "FOLDER/model.pt`"
            )


def _refuse_secrets(path: Path) -> None:
    if any(fnmatch(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
        raise UserError(f"{path} looks like a secret by its name: take it out of the folder")
    if path.stat().st_size > _TEXT_LIMIT or path.suffix in (*_TORCH_FILES, ".safetensors"):
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for what, pattern in _SECRETS.items():
        if found := pattern.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{path}, line {line}, holds what looks like {what}: take it out")


def _refuse_optimizer_and_code(path: Path) -> None:
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(f"{path} is a pickle, which runs code when it is read: save safetensors")
    names: list[str] = []
    if path.suffix == ".safetensors":
        names = _safetensors_names(path)
    elif path.suffix in _TORCH_FILES:
        names = _torch_names(path)
    for name in names:
        if _OPTIMIZER.match(name):
            raise UserError(
                f"{path} holds the state of an optimizer ({name}), which only the run itself can "
                "use: send the weights alone (`rae-xla checkpoints export RUN --weights-only`)"
            )


def _safetensors_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from error


def _torch_names(path: Path) -> list[str]:
    """The keys of a ``torch.save`` file; tensors stay on the disk."""
    import torch

    content: Any
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a file that is not a pickle may raise anything
        raise UserError(
            f"{path} is no file of tensors, or one that runs code when it is read "
            f"({str(error).strip().splitlines()[0]}): save safetensors"
        ) from error
    return [str(key) for key in content] if isinstance(content, dict) else []
