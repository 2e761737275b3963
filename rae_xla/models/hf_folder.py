"""Configuration and weights of Hugging Face model folders, local or on the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.weights import read_weight_file

# In the order of preference. An index lists the files of weights that are split.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DIFFUSERS_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)


def is_hub_id(name: str) -> bool:
    """Return whether ``name`` is an ``owner/model`` id on the hub rather than a local path.

    A hub id has exactly one slash, does not start like a path, and there is no local folder with
    the owner's name. Everything else is a path, so that a mistyped path is never downloaded.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return False
    return not Path(name.split("/")[0]).exists()


def find_file(folder: str, filename: str) -> Path | None:
    """Return the local path of a file of a model, or None if the model has no such file.

    Args:
        folder: local model folder or hub id; files on the hub are downloaded to the cache.
        filename: name of the file in the folder.

    Raises:
        UserError: if the folder or repository does not exist or cannot be accessed.
    """
    path = _download(folder, filename) if is_hub_id(folder) else Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"the model folder {folder} does not exist; give a folder written by transformers' "
            "save_pretrained, or a hub id such as facebook/dinov2-with-registers-base"
        )
    return path / filename if (path / filename).is_file() else None


def read_json(folder: str, filename: str) -> dict[str, Any] | None:
    """Return the content of a model's JSON file, or None if the model has no such file.

    Args:
        folder: local model folder or hub id.
        filename: name of the file in the folder.

    Raises:
        UserError: if the folder does not exist or the file is not a JSON object.
    """
    path = find_file(folder, filename)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must contain a JSON object")
    return values


def read_weights(folder: str, files: Sequence[str] = WEIGHT_FILES) -> dict[str, Tensor]:
    """Read all weights of a model, which may be split over several files.

    Args:
        folder: local model folder or hub id.
        files: file names to look for, in the order of preference.

    Returns:
        Tensors on the CPU by their key in the files.

    Raises:
        UserError: if there are no weight files, or one of them is missing or cannot be read.
    """
    for filename in files:
        path = find_file(folder, filename)
        if path is None:
            continue
        if not filename.endswith(".index.json"):
            return read_weight_file(path, "model weights")
        index = read_json(folder, filename) or {}
        weights: dict[str, Tensor] = {}
        for part in sorted(set(index.get("weight_map", {}).values())):
            part_path = find_file(folder, part)
            if part_path is None:
                raise UserError(f"{folder}: {part}, listed in {filename}, does not exist")
            weights.update(read_weight_file(part_path, "model weights"))
        return weights
    raise UserError(f"{folder} contains no weights: expected one of {', '.join(files)}")


def _download(repository: str, filename: str) -> Path:
    """Download a file of a repository to the cache; return the folder of the cached snapshot.

    ``snapshot_download`` rather than ``hf_hub_download``: without a network it returns a cached
    snapshot even if that lacks the file, so that the caller can try another file name.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[filename]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot download {filename} of {repository} from the Hugging Face hub ({reason}); "
            "to use a local folder of this name, start its path with ./"
        ) from error
