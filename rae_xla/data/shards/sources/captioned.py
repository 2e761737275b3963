"""Image source: images with captions, from tars or from the columns of a data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from rae_xla import storage
from rae_xla.data.image_finder import LeftOut
from rae_xla.data.shards.captioned import CLASS_NAMES, CONVERSATION_FILES
from rae_xla.data.shards.captioned_tar import scan_captioned_tar
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.sample_filter import (
    FoundSamples,
    SampleFilter,
    describe_dropped,
    image_facts,
    number_fault,
)
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.data.shards.sources.hub import (
    TableImages,
    check_columns,
    encoded_images,
    folders_of,
    holds_columns,
    only_column,
    open_table,
)
from rae_xla.data.shards.tars import tar_files
from rae_xla.data.shards.worker_pool import ordered_map
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar

SEVERAL = "a sample has no image or several (index the tars where they are to keep it)"


def captioned_tars(
    source: str,
    *,
    encoding: Encoding,
    accept: SampleFilter,
    shuffle: bool = True,
    workers: int = 1,
) -> tuple[ImageSource, Counter[str]]:
    """Return a source of images with captions from tars, and what is left out by reason.

    Every tar is read once from beginning to end. Samples with several images or none are left out.

    Args:
        source: a folder of tars, one tar, or a brace pattern; local or ``gs://``.
        encoding: how images are encoded.
        accept: which samples to take.
        shuffle: shuffle the samples, always the same way.
        workers: number of processes that read and encode.

    Raises:
        UserError: a tar is damaged, or no sample can be taken.
    """
    items: list[_TarItem] = []
    skipped, left_out = FoundSamples(), LeftOut()
    paths = tar_files(source)
    tars = ordered_map(partial(scan_captioned_tar, accept=accept), paths, workers)
    bar = progress_bar(tars, total=len(paths), desc="reading texts", unit="tar")
    for path, scanned in zip(paths, bar, strict=True):
        found, images = scanned.found, iter(scanned.found.images)
        skipped.merge(replace(found, texts=[], counts=[], images=[], answers=0))
        left_out.merge(scanned.left_out)
        for texts, count in zip(found.texts, found.counts, strict=True):
            [*of_sample] = (next(images) for _ in range(count))
            if count != 1:
                skipped.drop(SEVERAL, scanned.shard.file)
                continue
            items.append(_TarItem(path, of_sample[0].offset, of_sample[0].size, texts))
    left_out.log(f"{source}: members of the tars")
    items = [items[i] for i in sample_order(len(items), shuffle)]
    hashed = (
        part
        for item in items
        for part in (f"{storage.split(item.path)[1]} {item.offset}".encode(), item.texts)
    )
    return _source(source, items, _load_from_tar, hash_of(hashed), encoding, workers, skipped)


def captioned_table(
    source: str,
    *,
    encoding: Encoding,
    accept: SampleFilter,
    split: str = "train",
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> tuple[ImageSource, Counter[str]]:
    """Return a source of images with captions from a data set that ``datasets`` can load.

    The texts of a sample are the other columns, as ``json``: a column ``text`` is ``json.text``.

    Args:
        source: see ``hub_source``.
        encoding: how images are encoded.
        accept: which samples to take.
        split: of the data set.
        image_column: if None, the only column of images.
        caption_columns: of texts; if None, all other columns.
        shuffle: shuffle the samples, always the same way.
        workers: number of processes that encode.

    Raises:
        UserError: the data set cannot be read, lacks a column, or no sample can be taken.
    """
    table = open_table(source, split)
    import datasets

    image = image_column or only_column(table, datasets.Image, source, "--image-column")
    columns = list(caption_columns or (n for n in table.column_names if n != image))
    check_columns(table, [image, *columns], source)
    images = TableImages(source, encoded_images(table, image, source), image, folders_of(source))
    items: list[tuple[int, bytes]] = []
    skipped = FoundSamples()
    rows = progress_bar(_rows(table, columns), total=len(table), desc="reading texts", unit="row")
    for row, values in enumerate(rows):
        texts = {"json": values}
        facts = []
        if accept.needs_sides:
            facts = [image_facts(images.content(row))]
        reason = number_fault(1, texts) or accept.reason(facts, texts)
        if reason is not None:
            skipped.drop(reason, f"row {row}")
            continue
        line = json.dumps(texts, ensure_ascii=False, default=str).encode()
        items.append((row, line))
    items = [items[i] for i in sample_order(len(items), shuffle)]
    # The total size represents the images: hashing them would take as long as making the shards.
    size = str(table.info.dataset_size or "").encode()
    contents = hash_of([image.encode(), size, *(b"%d %b" % item for item in items)])
    load = partial(_load_from_table, images)
    return _source(source, items, load, contents, encoding, workers, skipped)


def open_captioned_source(
    path: str,
    *,
    encoding: Encoding,
    accept: SampleFilter,
    split: str = "train",
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> tuple[ImageSource, Counter[str]]:
    """Open a source of images with captions, whose kind follows from its path.

    Args:
        path: see ``captioned_tars`` and ``captioned_table``.
        encoding: how images are encoded.
        accept: which samples to take.
        split: of a data set.
        image_column: of a data set.
        caption_columns: of a data set.
        shuffle: shuffle the samples, always the same way.
        workers: number of processes that read and encode.

    Returns:
        The source, and the number of samples that are left out by reason.

    Raises:
        UserError: there is no usable source at ``path``.
    """
    if path.endswith(CONVERSATION_FILES):
        raise UserError(
            f"{path}: the images of conversations are read where they are: use `rae-xla shards "
            f"index {path} --images FOLDER --out INDEX`"
        )
    if holds_columns(path):
        return captioned_table(
            path,
            encoding=encoding,
            accept=accept,
            split=split,
            image_column=image_column,
            caption_columns=caption_columns,
            shuffle=shuffle,
            workers=workers,
        )
    if image_column or caption_columns:
        raise UserError(
            f"{path}: --image-column and --caption-columns are for data sets of the hub and "
            "parquet files; leave them out"
        )
    return captioned_tars(path, encoding=encoding, accept=accept, shuffle=shuffle, workers=workers)


class _TarItem(NamedTuple):
    path: str
    offset: int
    size: int
    texts: bytes


def _load_from_tar(encoding: Encoding, item: _TarItem) -> ShardSample:
    content = storage.read_range(item.path, item.offset, item.size)
    where = f"{item.path}, the image at byte {item.offset}"
    return replace(encoding.of_file(content, 0, where), texts=item.texts)


def _load_from_table(
    images: TableImages, encoding: Encoding, item: tuple[int, bytes]
) -> ShardSample:
    row, texts = item
    return replace(images(encoding, (row, 0)), texts=texts)


def _rows(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    yield from table.select_columns(columns)


def _source(
    name: str,
    items: Sequence[Any],
    load: Any,
    contents: str,
    encoding: Encoding,
    workers: int,
    skipped: FoundSamples,
) -> tuple[ImageSource, Counter[str]]:
    dropped, first_dropped = skipped.dropped, skipped.first_dropped
    if not items:
        raise UserError(
            f"{name}: none of the samples can be used: {describe_dropped(dropped, first_dropped)}. "
            "A sample is an image and a text"
        )
    source = ImageSource(
        items,
        load,
        CLASS_NAMES,
        contents,
        encoding,
        workers,
        captioned=True,
        dropped=dropped,
        first_dropped=first_dropped,
    )
    return source, dropped
