"""Index images with captions or conversations where they are, without copying the images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rae_xla import storage
from rae_xla.data.image_decoding import ROTATED, is_rotated
from rae_xla.data.image_finder import ImageNotes, LeftOut
from rae_xla.data.shards.captioned_tar import TEXT_EXTENSIONS, scan_captioned_tar
from rae_xla.data.shards.index import INDEX_FILE, SAMPLE, Shard, ShardIndex, open_index, save_index
from rae_xla.data.shards.sample_filter import (
    FoundSamples,
    ImageFacts,
    SampleFilter,
    describe_dropped,
    image_facts,
    named_images,
    number_fault,
)
from rae_xla.data.shards.tars import tar_files
from rae_xla.data.shards.texts import save_texts
from rae_xla.data.shards.worker_pool import ordered_map
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

CLASS_NAMES = ("image",)
"""All samples have label 0."""
CONVERSATION_FILES = (".jsonl", ".ndjson")


@dataclass
class IndexedCaptions:
    """What was indexed.

    Attributes:
        index: of the images of the samples that were taken.
        samples: that were taken.
        dropped: number of samples that were not, by reason.
        first_dropped: name of the first one, by reason.
    """

    index: ShardIndex
    samples: int
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)


def index_captioned(
    source: str,
    out: str,
    *,
    accept: SampleFilter | None = None,
    sidecar: str | None = None,
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> IndexedCaptions:
    """Write an index of tars of images with captions, and their texts.

    Args:
        source: a folder of tars, one tar, or a brace pattern within one folder; local or ``gs://``.
        out: folder of the index.
        accept: which samples to take; by default all with a caption.
        sidecar: a JSON Lines file whose objects have the ``key`` of a sample and its captions.
        workers: number of processes; each reads one tar at a time.
        progress: called with the number of bytes read so far, and their total.

    Raises:
        UserError: there is an index already, a tar is damaged, or no sample can be taken.
    """
    paths = tar_files(source)
    [folder, *others] = sorted({storage.split(path)[0] for path in paths})
    if others:
        raise UserError(f"{source}: an index covers one folder; index each folder separately")
    _check_out(out)
    extra = _read_sidecar(sidecar) if sidecar is not None else {}
    present = storage.list_files(folder)
    total = sum(present[storage.split(path)[1]].size for path in paths)
    shards: list[Shard] = []
    found, left_out, notes = FoundSamples(), LeftOut(), ImageNotes()
    done = in_sidecar = 0
    scan = partial(scan_captioned_tar, accept=accept or SampleFilter(), sidecar=extra)
    for scanned in ordered_map(scan, paths, workers):
        found.merge(scanned.found)
        left_out.merge(scanned.left_out)
        notes.merge(scanned.notes)
        in_sidecar += scanned.in_sidecar
        done += scanned.shard.bytes
        if scanned.shard.samples:  # a shard without images cannot be in an index
            shards.append(scanned.shard)
        if progress is not None:
            progress(done, total)
    if not found.texts:
        unused_members = f" (left out: {left_out})" if left_out.counts else ""
        raise UserError(
            f"{source}: none of the samples can be used: {_dropped(found)}{unused_members}. A "
            f"sample is an image and a text member ({', '.join(TEXT_EXTENSIONS)}) with the same "
            "key, or a .json with conversations"
        )
    left_out.log(f"{source}: members of the tars")
    notes.log(source)
    if in_sidecar < len(extra):
        unused = len(extra) - in_sidecar
        logger.warning("%s: %d of %d keys are of no sample", sidecar, unused, len(extra))
    return _save(out, shards, found, None if out == folder else folder)


def index_conversations(
    source: str,
    out: str,
    *,
    images: str | None = None,
    accept: SampleFilter | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> IndexedCaptions:
    """Write an index of a JSON Lines file of conversations, and of the images that it names.

    A line has ``conversations`` (or a ``caption``) and, if it has images, their names in ``image``,
    ``images`` or ``image_filename``. The images are read where they are, one file each.

    Args:
        source: the file, local or ``gs://``.
        out: folder of the index.
        images: folder that the names are relative to; default: that of ``source``.
        accept: which samples to take; by default all with a text.
        progress: called with the number of lines read so far, and their total.

    Raises:
        UserError: there is an index already, a line is not valid, or no sample can be taken.
    """
    _check_out(out)
    accept = accept or SampleFilter()
    folder = images or storage.split(source)[0] or "."
    if not storage.is_remote(folder):
        folder = os.path.abspath(folder)
    lines = storage.read_bytes(source).splitlines()
    found, notes = FoundSamples(), ImageNotes()
    shards: list[Shard] = []
    for number, line in enumerate(lines, start=1):
        if progress is not None:
            progress(number, len(lines))
        if not line.strip():
            continue
        texts = {"json": _parse_line(source, number, line)}
        files: list[Shard] = []
        facts: list[ImageFacts] = []
        names = named_images(texts) or []
        reason = next(filter(None, (_outside(name) for name in names)), None)
        for name in names if reason is None else ():
            try:
                content = storage.read_bytes(storage.join(folder, name))
            except FileNotFoundError:
                reason = "an image does not exist"
                break
            except IsADirectoryError:
                reason = "an image is a folder"
                break
            if is_rotated(content):
                notes.add(ROTATED, name)
            files.append(_image_file(name, content))
            facts.append(image_facts(content, with_sides=accept.needs_sides))
        reason = reason or number_fault(len(facts), texts) or accept.reason(facts, texts)
        if reason is not None:
            found.drop(reason, f"line {number}")
            continue
        shards += files
        found.add(json.dumps(texts, ensure_ascii=False).encode(), facts, texts)
    if not found.texts:
        raise UserError(
            f"{source}: none of the samples can be used: {_dropped(found)}. A line "
            "is a JSON object with conversations, and with image if it has one"
        )
    notes.log(folder)
    return _save(out, shards, found, folder if shards else None)


def _save(
    out: str, shards: list[Shard], found: FoundSamples, shards_folder: str | None
) -> IndexedCaptions:
    storage.make_folder(out)
    table = np.array([(i.offset, i.size, 0, i.crc32) for i in found.images], SAMPLE)
    save_texts(out, found.texts, found.dropped, found.counts, found.answers)
    save_index(out, shards, CLASS_NAMES, table, shards_folder)
    return IndexedCaptions(open_index(out), len(found.texts), found.dropped, found.first_dropped)


def _dropped(found: FoundSamples) -> str:
    if not found.dropped:
        return "there is none"
    return describe_dropped(found.dropped, found.first_dropped)


def _check_out(out: str) -> None:
    if storage.exists(storage.join(out, INDEX_FILE)):
        raise UserError(
            f"{storage.join(out, INDEX_FILE)} exists already: delete it if it is out of date, or "
            "give another folder with --out"
        )


def _image_file(name: str, content: bytes) -> Shard:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Shard(name, 1, len(content), hashlib.sha256(content).hexdigest(), md5)


def _outside(name: str) -> str | None:
    """Return a reason if a name leads out of the folder of images: it could be any file."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or "://" in name or ".." in parts:
        return "an image is named by a path outside of the folder of images"
    return None


def _parse_line(source: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{source}, line {number}: expected a JSON object with conversations: correct the line"
        )
    return value


def _read_sidecar(path: str) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for number, line in enumerate(storage.read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            captions[str(value["key"])] = value
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with the key of a sample"
            ) from None
    return captions
