"""Texts of the samples of an index: captions and other metadata, next to ``index.json``.

``texts.jsonl`` has one line for each sample: a JSON object with the text members of the sample by
extension (``txt`` as text, ``json`` as parsed JSON) and, as ``sidecar``, the line of a separate
file. ``texts.npy`` has the offsets of the lines, and ``texts.json`` their number and checksums.

Sample i is image i of the index. Where samples have no image or several, ``images.npy`` has the
number of the first image of each sample; the images of a sample are adjacent in the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.errors import UserError

LINES_FILE, OFFSETS_FILE, FACTS_FILE = "texts.jsonl", "texts.npy", "texts.json"
IMAGES_FILE = "images.npy"
TEXT_FILES = (LINES_FILE, OFFSETS_FILE, FACTS_FILE, IMAGES_FILE)
_FORMAT = "rae-xla texts"

Texts = Mapping[str, Any]
"""The texts of one sample by where they come from."""


def value_at(texts: Any, path: str) -> Any:
    """Return the value at a dotted path such as ``json.conversations.1.value``; None if absent.

    A number selects an element of a list, or a line of a text.
    """
    value: Any = texts
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, str)) and part.lstrip("-").isdigit():
            items = value.splitlines() if isinstance(value, str) else value
            value = items[int(part)] if -len(items) <= int(part) < len(items) else None
        else:
            return None
    return value


def strings(value: Any) -> Iterator[str]:
    """Yield all texts in a value of parsed JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings(item)


def save_texts(
    folder: str,
    texts: Sequence[bytes],
    dropped: Mapping[str, int],
    images: Sequence[int] | None = None,
    answers: int | None = None,
) -> None:
    """Write the texts of an index.

    Args:
        folder: of the index.
        texts: JSON objects, one for each sample, without line breaks.
        dropped: number of samples that were left out of the index, by reason.
        images: number of images of each sample; None: one each.
        answers: number of samples with an image to generate; None: all.
    """
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(line) + 1 for line in texts], out=offsets[1:])
    lines = b"".join(line + b"\n" for line in texts)
    buffer = io.BytesIO()
    np.save(buffer, offsets)
    files = {LINES_FILE: lines, OFFSETS_FILE: buffer.getvalue()}
    if images is not None and any(count != 1 for count in images):
        first = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(images, out=first[1:])
        buffer = io.BytesIO()
        np.save(buffer, first)
        files[IMAGES_FILE] = buffer.getvalue()
    facts = {
        "format": _FORMAT,
        "samples": len(texts),
        "answers": len(texts) if answers is None else answers,
        "dropped": dict(dropped),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    storage.write_bytes(storage.join(folder, FACTS_FILE), (json.dumps(facts) + "\n").encode())


@dataclass
class TextTable:
    """The texts of an index; it pickles, and every process opens the file itself.

    Attributes:
        folder: of the index.
        offsets: of the lines, one more than there are samples.
        fingerprint: SHA-256 of the lines, and of the numbers of images if they are not one each.
        first_image: of each sample, one more than there are samples; None: sample i has image i.
        has_answers: whether any sample has an image to generate.
    """

    folder: str
    offsets: NDArray[np.int64]
    fingerprint: str
    first_image: NDArray[np.int64] | None = None
    has_answers: bool = True
    _content: mmap.mmap | bytes | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_content": None}

    def __getitem__(self, sample: int) -> Texts:
        """Return the texts of a sample."""
        start, end = self.offsets[sample : sample + 2].tolist()
        texts: Texts = json.loads(self._lines()[start:end])
        return texts

    def image_count(self, sample: int) -> int:
        """Return the number of images of a sample."""
        if self.first_image is None:
            return 1
        return int(self.first_image[sample + 1] - self.first_image[sample])

    def _lines(self) -> mmap.mmap | bytes:
        if self._content is None:
            path = storage.join(self.folder, LINES_FILE)
            if storage.is_remote(path):
                self._content = storage.read_bytes(path)
            else:
                with open(path, "rb") as file:
                    self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._content


def has_texts(folder: str) -> bool:
    """Return whether the index in a folder has texts."""
    return storage.exists(storage.join(folder, FACTS_FILE))


def open_texts(folder: str, images: int) -> TextTable:
    """Open the texts of an index.

    Args:
        folder: of the index, or its ``index.json``.
        images: of the index.

    Raises:
        UserError: there are none, they are damaged, or they belong to another index.
    """
    folder = storage.split(folder)[0] if folder.endswith(".json") else folder
    path = storage.join(folder, FACTS_FILE)
    if not storage.exists(path):
        raise UserError(
            f"{folder} has no captions: index the source with `rae-xla shards index SOURCE "
            "--captions --out FOLDER`"
        )
    try:
        facts = json.loads(storage.read_bytes(path))
        checksums = facts["sha256"]
        offsets = _read_table(folder, OFFSETS_FILE, checksums)
        first_image = None
        if IMAGES_FILE in checksums:
            first_image = _read_table(folder, IMAGES_FILE, checksums)
        size = storage.size(storage.join(folder, LINES_FILE))
        fingerprint = str(checksums[LINES_FILE])
        if first_image is not None:
            fingerprint = f"{fingerprint} {checksums[IMAGES_FILE]}"
        has_answers = int(facts.get("answers", 1)) > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: the captions cannot be read ({error}): index the tars again"
        ) from None
    samples = len(offsets) - 1
    known = samples if first_image is None else int(first_image[-1])
    rows = samples if first_image is None else len(first_image) - 1
    if known != images or rows != samples or offsets[-1] != size:
        raise UserError(
            f"{folder}: there are {samples} captions for {known} images, the index has {images}; "
            f"and {size} of {offsets[-1]} bytes: index the tars again"
        )
    return TextTable(folder, offsets, fingerprint, first_image, has_answers)


def _read_table(folder: str, name: str, checksums: Mapping[str, str]) -> NDArray[np.int64]:
    content = storage.read_bytes(storage.join(folder, name))
    if hashlib.sha256(content).hexdigest() != checksums[name]:
        raise UserError(f"{folder}: {name} is not the one that {FACTS_FILE} describes")
    table: NDArray[np.int64] = np.load(io.BytesIO(content), allow_pickle=False)
    return table
