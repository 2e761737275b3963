"""Image source: a folder with a sub-folder of images per class, as in ImageNet."""

from __future__ import annotations

import os

from rae_xla.data.class_names import in_label_order, warn_of_numbers
from rae_xla.data.image_finder import (
    FOLDER,
    LeftOut,
    find_files,
    is_image,
    kind_of,
    no_images_message,
)
from rae_xla.data.shards.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.data.shards.tars import refuse_compressed
from rae_xla.errors import UserError


def folder_source(
    folder: str,
    *,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Return a source of images from a folder with a sub-folder, of any depth, per class.

    What is not taken (hidden files, other extensions) is logged.

    Args:
        folder: a local path.
        encoding: how images are encoded.
        class_names: the names of the sub-folders by label (some may be missing); if None, the
            sub-folders are numbered by sorted name, or by number if all names are numbers.
        shuffle: shuffle the images, always the same way.
        workers: number of processes that read and encode.

    Raises:
        UserError: there are no class folders, one has no image or is not in ``class_names``, or
            there are images outside of them; while iterating, if an image cannot be read.
    """
    left_out = LeftOut()
    folders = _class_folders(folder, left_out)
    if class_names is None:
        warn_of_numbers(folders, f"{folder}: class folder")
    classes = tuple(folders) if class_names is None else class_names
    labels = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in folders if name not in labels]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{folder}: --classes gives no label to the folder {', '.join(unknown[:3])}{more}: "
            "add them to that file, or move them away"
        )
    items: list[tuple[str, int]] = []
    for name in folders:
        path, of_class = os.path.join(folder, name), LeftOut()
        files = find_files(path, of_class)
        if not files:
            raise UserError(
                f"{path}: the folder of class {name} has no images: {no_images_message(of_class)}"
            )
        left_out.merge(of_class)
        items += ((file, labels[name]) for file in files)
    left_out.log(folder)
    items = [items[i] for i in sample_order(len(items), shuffle)]
    # Relative names, because the folder may move; and no sizes, so that finished shards still match
    # after an image that stopped the command was repaired.
    start = len(os.path.join(folder, ""))
    contents = hash_of(os.fsencode(f"{path[start:]}\n{label}") for path, label in items)
    return ImageSource(items, _load, classes, contents, encoding, workers)


def _class_folders(folder: str, left_out: LeftOut) -> list[str]:
    """Return the names of the sub-folders, in the order of their labels."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({error.strerror})") from None
    folders, stray = [], []
    for entry in entries:
        kind = kind_of(entry)
        if kind == FOLDER:
            folders.append(entry.name)
        elif kind is not None:
            left_out.add(kind, entry.path)
        elif is_image(entry.name):
            stray.append(entry.name)
        else:
            left_out.add_file(entry.path)
    if stray:
        raise UserError(
            f"{folder}: {len(stray)} images ({stray[0]}, …) are outside of the class folders: move "
            "every image to the folder of its class"
        )
    for name in folders:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are not valid UTF-8
            raise UserError(
                f"{folder}: the name of the class folder {name!a} is not valid UTF-8: rename it"
            )
    if not folders:
        refuse_compressed([entry.path for entry in entries])
        found_instead = f" (it contains {left_out})" if left_out.counts else ""
        raise UserError(
            f"{folder}: no images: there must be a sub-folder of images per class{found_instead}"
        )
    return in_label_order(folders)


def _load(encoding: Encoding, item: tuple[str, int]) -> ShardSample:
    path, label = item
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return encoding.of_file(content, label, path)
