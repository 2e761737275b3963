"""A Hugging Face model folder, local or on the hub: its configuration and its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models.weights import read_weight_file

# In the order of preference; an index names the files that the weights are split over.
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
    """Whether ``name`` means ``owner/model`` on the hub rather than a path on this machine.

    A hub id has exactly one slash, does not start like a path and has no folder of the owner's
    name here. Anything else is a path, so a mistyped path never becomes a download.
    """
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        return False
    return not Path(name.split("/")[0]).exists()


def find_file(folder: str, filename: str) -> Path | None:
    """Locate a file of a model folder or hub repository; None if the model has no such file.

    Raises:
        UserError: if the folder or repository does not exist or cannot be reached.
    """
    path = _fetched(folder, filename) if is_hub_id(folder) else Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"there is no model folder {folder}; give one that transformers' save_pretrained "
            "wrote, or a hub id such as facebook/dinov2-with-registers-base"
        )
    return path / filename if (path / filename).is_file() else None


def read_json(folder: str, filename: str) -> dict[str, Any] | None:
    """Read a JSON file of a model folder or hub repository; None if the model has no such file.

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
        raise UserError(f"{path} must hold a JSON object")
    return values


def read_weights(folder: str, files: Sequence[str] = WEIGHT_FILES) -> dict[str, Tensor]:
    """Read all weights of a model folder or hub repository, by their names in the files.

    ``files`` are the names to look for, the preferred first.

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
                raise UserError(f"{folder}: {filename} names {part}, which is not there")
            weights.update(read_weight_file(part_path, "model weights"))
        return weights
    raise UserError(f"{folder} holds no weights: expected one of {', '.join(files)}")


def _fetched(repository: str, filename: str) -> Path:
    """Download a file of a repository unless it is cached; the folder of the cached snapshot.

    As a snapshot of one file, because without a network that still says which files there are.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[filename]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{filename} of {repository} could not be had from the Hugging Face hub ({reason}); "
            "if it is a folder on this machine, write its path with a leading ./"
        ) from error
