"""Prompts: what the user asked for, from the command line or from a file of a benchmark."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rae_xla import storage
from rae_xla.config.paths import StoragePath
from rae_xla.data.image_finder import FOLDER, HIDDEN, LeftOut
from rae_xla.errors import UserError

MAX_PROMPT_CHARS = 8_000
"""Longest prompt: far more than any model here can read."""

_ID_KEYS = ("id", "item_id", "prompt_id")  # of lines of JSON, in the order of preference
_NAME = re.compile(r"[\w.\-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Attributes:
        text: what the image is to show.
        name: of its files: its id, or its number with five digits.
        line: the line of the file that it is from, for formats that copy it; else empty.
    """

    text: str
    name: str
    line: str = ""


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise unless every prompt has text, of a length that a model can read.

    Raises:
        UserError: one is empty or too long.
    """
    if not prompts:
        raise UserError("there is no prompt: give one, such as --prompt 'a red square'")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty: write what the image is to show")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise UserError(
                f"prompt {number} has {len(prompt):,} characters, more than {MAX_PROMPT_CHARS:,}: "
                "shorten it"
            )


def read_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file or folder.

    Args:
        path: local or ``gs://``. A ``.jsonl`` file has an object with ``prompt`` on each line, and
            may have ``id`` (GenEval's ``evaluation_metadata.jsonl``); a ``.json`` file is an object
            of prompts by id; a folder has a text file for each prompt, named by its id (DPG-Bench);
            any other file has a prompt on each line, and empty lines are skipped.

    Raises:
        UserError: the file cannot be read, or a prompt in it is missing, empty or too long, or two
            have the same id.
    """
    where = StoragePath(path)
    if storage.is_folder(path):
        names = _text_files(where)
        prompts = [Prompt(_text(where / n).strip(), n.removesuffix(".txt")) for n in names]
    elif path.endswith(".jsonl"):
        lines = list(enumerate(_lines(where), start=1))
        full = [(line, number) for number, line in lines if line.strip()]
        prompts = [
            _from_line(line, i, f"{path}, line {number}") for i, (line, number) in enumerate(full)
        ]
    elif path.endswith(".json"):
        prompts = _from_object(_parse(_text(where), path), path)
    else:
        texts = [line for line in _lines(where) if line.strip()]
        prompts = [Prompt(text, f"{number:05d}") for number, text in enumerate(texts)]
    try:
        check_prompts([prompt.text for prompt in prompts])
    except UserError as error:
        raise UserError(f"--prompts {path}: {error}") from None
    _check_names(prompts, path)
    return prompts


def noise_key(prompt: str) -> tuple[int, int]:
    """Return two signed 32-bit integers that identify a prompt, from its SHA-256."""
    digest = hashlib.sha256(prompt.encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "big", signed=True) for i in (0, 4))
    return first, second


def _text_files(folder: StoragePath) -> list[str]:
    """Return the names of the text files of a folder; what else there is is logged."""
    names, left_out = [], LeftOut()
    for name in sorted(storage.list_files(folder)):
        if name.startswith("."):
            left_out.add(HIDDEN, name)
        elif name.endswith(".txt"):
            names.append(name)
        else:
            left_out.add_file(name)
    for name in sorted(storage.list_folders(folder)):
        left_out.add(HIDDEN if name.startswith(".") else FOLDER, name)
    if not names:
        found = f" (it contains {left_out})" if left_out.counts else ""
        raise UserError(f"--prompts {folder}: the folder has no .txt files{found}")
    left_out.log(f"--prompts {folder}")
    return names


def _lines(path: StoragePath) -> list[str]:
    """Return the lines of a file; unlike ``splitlines``, other separators are part of a text."""
    return re.split("\r\n|\n|\r", _text(path))


def _from_line(line: str, number: int, where: str) -> Prompt:
    values = _parse(line, where)
    text = values.get("prompt")
    if not isinstance(text, str):
        raise UserError(f"--prompts {where}: there is no text in 'prompt'")
    name = next((values[key] for key in _ID_KEYS if key in values), f"{number:05d}")
    return Prompt(text, str(name), line)


def _from_object(values: dict[str, Any], path: str) -> list[Prompt]:
    for name, text in values.items():
        if not isinstance(text, str):
            raise UserError(f"--prompts {path}: {name!r} has no text: expected prompts by id")
    return [Prompt(text, name) for name, text in values.items()]


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"--prompts {where} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"--prompts {where} is not a JSON object")
    return values


def _text(path: StoragePath) -> str:
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {path} cannot be read ({error}): give a UTF-8 text file"
        ) from None


def _check_names(prompts: Sequence[Prompt], path: str) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if not _NAME.fullmatch(prompt.name) or prompt.name.startswith("."):
            raise UserError(
                f"--prompts {path}: the id {prompt.name!r} cannot be the name of a file: use "
                "letters, digits, dots, hyphens and underscores"
            )
        if prompt.name.lower() in seen:
            raise UserError(f"--prompts {path}: two prompts have the id {prompt.name!r}")
        seen.add(prompt.name.lower())
