"""Image source: a folder with a sub-folder of images per class, as in ImageNet."""

from __future__ import annotations

import os

from rae_xla.data.shards.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.data.transforms import IMAGE_EXTENSIONS
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

    Args:
        folder: a local path.
        encoding: how images are encoded.
        class_names: the names of the sub-folders by label (some may be missing); if None, the
            sub-folders are numbered by sorted name.
        shuffle: shuffle the images, always the same way.
        workers: number of processes that read and encode.

    Raises:
        UserError: there are no class folders, one has no image or is not in ``class_names``, or
            there are images outside of them; while iterating, if an image cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted(
            (entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name
        )
    stray = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if stray:
        raise UserError(
            f"{folder}: {len(stray)} images ({stray[0]}, …) are outside of the class folders: move "
            "every image to the folder of its class"
        )
    folders = [entry.name for entry in entries if entry.is_dir()]
    for name in folders:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are not valid UTF-8
            raise UserError(
                f"{folder}: the name of the class folder {name!a} is not valid UTF-8: rename it"
            )
    if not folders:
        raise UserError(f"{folder}: no images: there must be a sub-folder of images per class")
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
        files = _images_under(os.path.join(folder, name))
        if not files:
            raise UserError(f"{os.path.join(folder, name)}: the folder of class {name} is empty")
        items += ((file, labels[name]) for file in files)
    items = [items[i] for i in sample_order(len(items), shuffle)]
    # Relative names, because the folder may move; and no sizes, so that finished shards still match
    # after an image that stopped the command was repaired.
    start = len(os.path.join(folder, ""))
    contents = hash_of(os.fsencode(f"{path[start:]}\n{label}") for path, label in items)
    return ImageSource(items, _load, classes, contents, encoding, workers)


def _load(encoding: Encoding, item: tuple[str, int]) -> ShardSample:
    path, label = item
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return encoding.of_file(content, label, path)


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and not name.startswith(".")


def _images_under(folder: str) -> list[str]:
    """Return the images in a folder and its sub-folders, sorted by path."""
    found: list[str] = []
    for parent, below, names in os.walk(folder, followlinks=True):
        found += (os.path.join(parent, name) for name in names if _is_image(name))
        real = os.path.realpath(parent)
        for name in below:
            # A link to a parent folder would be followed without end.
            if (real + os.sep).startswith(os.path.realpath(os.path.join(parent, name)) + os.sep):
                raise UserError(
                    f"{os.path.join(parent, name)}: a link to a parent folder; remove it"
                )
    return sorted(found)
