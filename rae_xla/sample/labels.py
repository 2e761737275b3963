"""Class labels of the images to generate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rae_xla.data.class_names import find_class
from rae_xla.errors import UserError


def make_labels(spec: str, count: int, num_classes: int, seed: int) -> Tensor:
    """Return the labels of a sample set.

    Args:
        spec: ``equal`` (every class equally often, in order), ``random`` (drawn from ``seed``), or
            labels such as ``207,360``, repeated in turn.
        count: number of images.
        num_classes: number of classes of the model.
        seed: seed of ``random``.

    Returns:
        (count,) int64.

    Raises:
        UserError: if ``spec`` is unknown, a label is out of range, or ``count`` is not a multiple
            of ``num_classes`` with ``equal``.
    """
    if spec == "equal":
        if count % num_classes:
            near = max(1, round(count / num_classes)) * num_classes
            raise UserError(
                f"--labels equal: {count} images cannot be divided equally among {num_classes} "
                f"classes; request {near} images, or use --labels random"
            )
        return torch.arange(num_classes).repeat_interleave(count // num_classes)
    if spec == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(num_classes, (count,), generator=generator)
    try:
        labels = [int(text) for text in spec.split(",")]
    except ValueError:
        raise UserError(
            f"--labels {spec}: expected equal, random, or labels such as 207,360"
        ) from None
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise UserError(
            f"--labels: {wrong[0]} is out of range; the model has classes 0 to {num_classes - 1}"
        )
    return torch.tensor(labels).repeat(-(-count // len(labels)))[:count]


def choose_labels(
    classes: Sequence[str | int] | str | int, class_names: Sequence[str], count: int, seed: int
) -> list[int]:
    """Return the labels of ``count`` images that show the given classes in turn.

    Args:
        classes: class names (resolved by ``data.class_names.find_class``) or labels, or a single
            one; empty for random classes.
        class_names: the names of the model's classes, by label.
        count: number of images.
        seed: seed of random classes.

    Raises:
        UserError: if a class is unknown, or ``count`` is below 1.
    """
    if count < 1:
        raise UserError(f"cannot generate {count} images: request 1 or more")
    several = [classes] if isinstance(classes, (str, int)) else classes
    labels = [find_class(c, class_names) if isinstance(c, str) else int(c) for c in several]
    for label in labels:
        if not 0 <= label < len(class_names):
            raise UserError(
                f"class {label} is out of range; the model has classes 0 to {len(class_names) - 1}"
            )
    spec = ",".join(map(str, labels)) or "random"
    return [int(label) for label in make_labels(spec, count, len(class_names), seed)]
