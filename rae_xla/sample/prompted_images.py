"""Images of a folder with their prompts: what ``sample --prompts`` and ``generate`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rae_xla.errors import UserError
from rae_xla.sample.generated_folder import IMAGES_KEY, LISTING_FILE
from rae_xla.sample.prompt_files import PROMPTS_FILE


@dataclass(frozen=True)
class PromptedImage:
    """An image file and the prompt that it was generated from."""

    path: Path
    prompt: str


def read_prompted_images(folder: Path) -> list[PromptedImage]:
    """Return the images of a folder in the order of its manifest.

    Args:
        folder: local, with ``prompts.jsonl`` of ``rae-xla sample --prompts`` in any layout, or
            ``generated.json`` of ``rae-xla generate``, best-of-N included.

    Raises:
        UserError: there is no manifest, it cannot be read or has no prompts, or an image is
            missing.
    """
    if not folder.is_dir():
        raise UserError(f"samples {folder}: there is no such folder")
    listed = read_listing(folder)
    if listed is None:
        raise UserError(
            f"samples {folder}: there is neither {PROMPTS_FILE} of `rae-xla sample --prompts` nor "
            f"{LISTING_FILE} of `rae-xla generate --prompts`, which say what the images show: give "
            "a folder of one of these commands; if it was interrupted, repeat it"
        )
    if not listed:
        raise UserError(f"samples {folder}: the manifest lists no images: generate some")
    found = []
    for name, prompt in listed:
        if not isinstance(prompt, str):
            raise UserError(
                f"samples {folder}: {name} has no prompt: these images are of classes; give images "
                "of prompts, or measure them with `rae-xla evaluate gen`"
            )
        found.append(PromptedImage(folder / name, prompt))
    if missing := [name for name, _ in listed if not (folder / name).is_file()]:
        raise UserError(
            f"samples {folder}: {len(missing)} of {len(listed)} images are missing, such as "
            f"{missing[0]}: repeat the command that generates them"
        )
    return found


def read_listing(folder: Path) -> list[tuple[str, str | None]] | None:
    """Return the file names in the manifest of a folder, with their prompts.

    The prompt of an image of a class is None. Returns None if the folder has no manifest.

    Raises:
        UserError: the manifest cannot be read.
    """
    manifest = next((f for n in (PROMPTS_FILE, LISTING_FILE) if (f := folder / n).is_file()), None)
    if manifest is None:
        return None
    try:
        text = manifest.read_text(encoding="utf-8")
        entries = _lines(text) if manifest.name == PROMPTS_FILE else json.loads(text)[IMAGES_KEY]
        return [(str(entry["file"]), entry.get("prompt")) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{manifest} cannot be read ({reason}): generate the images again"
        ) from error


def _lines(text: str) -> Iterator[Any]:
    # Not splitlines: other separators are part of a prompt.
    return (json.loads(line) for line in text.split("\n") if line.strip())
