"""A folder with a sub-folder of images per class, as ImageNet comes."""

from __future__ import annotations

import os

from rae_xla.data.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.image_source import ImageSource, hash_of, sample_order
from rae_xla.data.reader import IMAGE_EXTENSIONS
from rae_xla.errors import UserError


def folder_source(
    folder: str,
    *,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """A folder with a sub-folder per class; images may lie at any depth in it.

    Args:
        folder: a local path.
        encoding: what becomes of the images.
        class_names: the names of the sub-folders by label (some may be absent); if None, the
            sub-folders are numbered by sorted name.
        shuffle: mix the classes, the same way every time.
        workers: processes that read and encode.

    Raises:
        UserError: if there are no class folders, one is without an image or not in
            ``class_names``, or images lie beside them; while iterating, if one cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted(
            (entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name
        )
    stray = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if stray:
        raise UserError(
            f"{folder}: {len(stray)} images ({stray[0]}, …) lie beside the class folders: put "
            "every image into the folder of its class"
        )
    folders = [entry.name for entry in entries if entry.is_dir()]
    for name in folders:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no UTF-8
            raise UserError(f"{folder}: the class folder {name!a} has no name in UTF-8: rename it")
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
    # Names in the folder, which may move, and no sizes: an image that stopped the command may be
    # mended, and what is finished still counts.
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
    """The images in a folder and those below it, sorted by path."""
    found: list[str] = []
    for parent, below, names in os.walk(folder, followlinks=True):
        found += (os.path.join(parent, name) for name in names if _is_image(name))
        real = os.path.realpath(parent)
        for name in below:
            # A link to a folder above would be followed in circles.
            if (real + os.sep).startswith(os.path.realpath(os.path.join(parent, name)) + os.sep):
                raise UserError(f"{os.path.join(parent, name)}: a link in a circle; remove it")
    return sorted(found)
