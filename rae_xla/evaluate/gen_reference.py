"""What generated pictures are compared with: a file of moments or images, or shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rae_xla.data import storage
from rae_xla.data.shards import open_index
from rae_xla.evaluate.generation import FRECHET, Features, GenReference, measure
from rae_xla.evaluate.inception import FeatureNetwork
from rae_xla.evaluate.npz_images import IMAGES, array_names, file_hash, open_npz
from rae_xla.evaluate.picture_sets import NpzPictures, PictureSet, ShardPictures
from rae_xla.evaluate.reconstruction import first_images
from rae_xla.evaluate.reference import (
    Reference,
    moments_in,
    open_images,
    originals,
    read_moments,
)
from rae_xla.runtime import Runtime


def load_gen_reference(
    path: str,
    image_size: int,
    runtime: Runtime,
    networks: Sequence[FeatureNetwork],
    metrics: Sequence[str],
    *,
    num_images: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
    moved: Callable[[], None] = lambda: None,
) -> GenReference:
    """Read a reference and measure what is not measured yet.

    Args:
        path: an ``.npz`` file with ``mu`` and ``sigma`` (for sFID ``mu_s`` and ``sigma_s``), or
            images as ``arr_0``, or both: as in the ADM reference batches, whose moments are those
            of the whole set and whose images are the 10,000 of precision and recall. Or a folder of
            shards, local or gs://, whose images are cut to ``image_size`` in the middle.
        image_size: side in pixels of the pictures to be compared.
        runtime: where the networks are.
        networks: those that ``metrics`` need.
        metrics: those to be measured.
        num_images: of shards: the first so many.
        batch_size: as for ``evaluate_generation``.
        num_workers: processes that decode the images of shards.
        progress: show a bar.
        moved: called after every chunk.

    Raises:
        UserError: no such file, another content, or images of another size.
    """
    named, pictures, features = _open(path, image_size, num_images, num_workers)
    missing: dict[str, str] = {}
    to_measure: list[str] = []
    for metric in metrics:
        if metric == "is" or FRECHET.get(metric) in features.gaussians:
            continue
        if pictures is not None and not (metric == "sfid" and features.gaussians):
            to_measure.append(metric)
        elif metric == "sfid":
            missing[metric] = f"{path} has mu and sigma but no mu_s and sigma_s, which sFID needs"
        else:
            missing[metric] = f"{path} has moments alone, and {metric} needs images (arr_0)"
    if pictures is not None and to_measure:
        found = measure(
            pictures,
            runtime,
            networks,
            to_measure,
            batch_size=batch_size,
            progress=progress,
            moved=moved,
        )
        features = replace(found, gaussians={**found.gaussians, **features.gaussians})
    return GenReference(named, features, missing)


def check_reference(path: str, image_size: int) -> None:
    """Find out what is wrong with a reference before networks are loaded, or downloaded.

    Raises:
        UserError: no such file, another content, or images of another size.
    """
    if _is_folder(path):
        open_index(path)
        return
    file = Path(path).expanduser()
    moments_in(file)
    if _has_images(file):
        open_images(file, image_size)


def _open(
    path: str, image_size: int, num_images: int | None, num_workers: int
) -> tuple[Reference, PictureSet | None, Features]:
    check_reference(path, image_size)
    if _is_folder(path):
        index = first_images(open_index(path), num_images, "eval.num_images=")
        return originals(index), ShardPictures(index, image_size, num_workers), Features()
    file = Path(path).expanduser()
    pictures = NpzPictures(file, "reference") if _has_images(file) else None
    count = pictures.count if pictures is not None else None
    if not moments_in(file):
        return Reference("images", path, count, file_hash(file)), pictures, Features()
    gaussians = {"pool": read_moments(file, "mu")}
    with open_npz(file, "reference") as archive:
        if {"mu_s", "sigma_s"} <= set(array_names(archive)):
            gaussians["spatial"] = read_moments(file, "mu_s")
    named = Reference("moments", path, None, file_hash(file), images=count)
    return named, pictures, Features(gaussians)


def _is_folder(path: str) -> bool:
    return storage.is_remote(path) or Path(path).expanduser().is_dir()


def _has_images(file: Path) -> bool:
    with open_npz(file, "reference") as archive:
        return IMAGES in array_names(archive)
