"""Upload a folder of weights to the Hugging Face hub.

All files are checked before the upload, which is one commit. Optimizer state, files that execute
code when they are read, and files that look like credentials are refused. huggingface_hub's
``upload_folder`` is not used because it selects the files itself: the files that were checked and
listed must be the files that are uploaded, and their checksums are verified afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.models.hf_folder import is_hub_id
from rae_xla.models.pretrained.hub import checksum, hub_checksums
from rae_xla.models.pretrained.hub_errors import hub_error

_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
_SKIPPED = ("*.unfinished", "*.incomplete", "__pycache__")
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
_TEXT_LIMIT = 4 << 20  # bytes: larger text files are data and are not searched


@dataclass(frozen=True)
class Upload:
    """The checked files of an upload.

    Attributes:
        folder: the local folder.
        files: paths in the folder of the files to upload.
        skipped: paths of hidden and unfinished files, and of links to folders or to nothing, which
            are not uploaded.
    """

    folder: Path
    files: tuple[str, ...]
    skipped: tuple[str, ...]

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        return (self.folder / path).stat().st_size


def prepare_upload(folder: Path) -> Upload:
    """Check the files of a folder; hidden and unfinished files, and links to no file, are skipped.

    Raises:
        UserError: the folder does not exist, is empty, or holds something that must not be
            uploaded.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one that save_pretrained wrote")
    _refuse_checkpoints(folder)
    files: list[str] = []
    skipped: list[str] = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        unfinished = any(fnmatch(part, pattern) for part in parts for pattern in _SKIPPED)
        taken = path.is_file() and not hidden and not unfinished
        (files if taken else skipped).append("/".join(parts))
    if not files:
        raise UserError(
            f"{folder} has no files to upload: give a folder that save_pretrained wrote"
        )
    for name in files:
        _refuse_secrets(folder / name)
        _refuse_optimizer_and_code(folder / name)
    return Upload(folder, tuple(files), tuple(skipped))


def push(upload: Upload, repository: str, *, public: bool = False, message: str = "") -> str:
    """Upload files as one commit; creates the repository if it does not exist.

    Args:
        upload: the files, from ``prepare_upload``.
        repository: ``owner/name``.
        public: whether a new repository is public, and a public one may be written to.
        message: the commit message; default: one that names the folder.

    Returns:
        The URL of the commit.

    Raises:
        UserError: no network, no write access, a public repository without ``public``, or files
            whose checksums differ after the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not is_hub_id(repository):
        raise UserError(f"{repository!r} is not a hub id: expected owner/name")
    additions = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise UserError(
                f"{repository} is public, so everyone could read these files: give --public to "
                "allow that, or give another repository"
            )
        commit = api.create_commit(
            repository,
            additions,
            commit_message=message or f"Upload {upload.folder.name} with rae-xla",
        )
        uploaded = hub_checksums(repository, commit.oid)
    except UserError:
        raise
    except Exception as error:  # as in hub.pull
        raise hub_error(error, repository, pushing=True) from error
    for name in upload.files:
        expected = uploaded.get(name, "")
        if checksum(upload.folder / name, expected) != expected:
            raise UserError(
                f"{name} has another checksum in {repository} than in {upload.folder}: push again"
            )
    return str(commit.commit_url)


def _refuse_checkpoints(folder: Path) -> None:
    """Raise if the folder contains a training checkpoint, which includes optimizer state."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and re.fullmatch(r"step-\d{8,}(\.unfinished)?", path.name):
            raise UserError(
                f"{path} is a training checkpoint, which includes optimizer state: upload only its "
                f"weights, from `rae-xla checkpoints export {folder} --what weights --out "
                "FOLDER/model.pt`"
            )


def _refuse_secrets(path: Path) -> None:
    if any(fnmatch(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
        raise UserError(f"{path} looks like a secret by its name: remove it from the folder")
    if path.stat().st_size > _TEXT_LIMIT or path.suffix in (*_TORCH_FILES, ".safetensors"):
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    for what, pattern in _SECRETS.items():
        if found := pattern.search(text):
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(f"{path}, line {line}, holds what looks like {what}: remove it")


def _refuse_optimizer_and_code(path: Path) -> None:
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(
            f"{path} is a pickle, which can execute code when it is read: save safetensors"
        )
    names: list[str] = []
    if path.suffix == ".safetensors":
        names = _safetensors_names(path)
    elif path.suffix in _TORCH_FILES:
        names = _torch_names(path)
    for name in names:
        if _OPTIMIZER.match(name):
            raise UserError(
                f"{path} holds optimizer state ({name}), which only the training run can use: "
                "upload only the weights (`rae-xla checkpoints export RUN --what weights`)"
            )


def _safetensors_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): write it again"
        ) from error


def _torch_names(path: Path) -> list[str]:
    """Return the keys of a ``torch.save`` file without reading its tensors."""
    import torch

    content: Any
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a file that is not a pickle may raise anything
        raise UserError(
            f"{path} is not a file of tensors, or executes code when it is read "
            f"({str(error).strip().splitlines()[0]}): save safetensors"
        ) from error
    return [str(key) for key in content] if isinstance(content, dict) else []
