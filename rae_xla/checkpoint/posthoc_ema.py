"""Post-hoc moving averages: store power-function averages along a run, combine them afterwards.

Every checkpoint holds the averages of the tracked widths (``training.posthoc_ema``). One that is no
longer kept for resumption is reduced to them instead of deleted, as long as the budget allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rae_xla import storage
from rae_xla.checkpoint.format import METADATA_FILE, part_of_file
from rae_xla.checkpoint.manager import (
    AVERAGE_PREFIX,
    AVERAGES_FILE,
    MANIFEST_FILE,
    BrokenCheckpointError,
    Checkpoint,
    checkpoint_path,
    delete_checkpoint,
    list_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.power_profiles import combine
from rae_xla.checkpoint.reader import load
from rae_xla.checkpoint.tensors import read_parts, stored_parts
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar

_GROUP_BYTES = 1 << 29
"""Weights that are combined at a time, in float32."""


@dataclass(frozen=True)
class StoredAverages:
    """The averages of one step, in a checkpoint or in what it was reduced to.

    Attributes:
        checkpoint: its folder.
        manifest: lists their files.
    """

    checkpoint: Checkpoint
    manifest: Mapping[str, Any]

    @property
    def parts(self) -> dict[float, str]:
        """The part that holds the average of each width."""
        return {width_of(part): part for part in average_parts(self.manifest)}


@dataclass(frozen=True)
class PosthocAverage:
    """An average of any width, combined from stored ones.

    Attributes:
        state: the weights, in the published layout.
        step: number of steps after which it was taken.
        sources: steps of the stored averages.
        error: distance of its profile from that of the width, relative to its norm.
        manifest: of the checkpoint of this step.
    """

    state: dict[str, Tensor]
    step: int
    sources: tuple[int, ...]
    error: float
    manifest: Mapping[str, Any]


def part_name(width: float) -> str:
    """Return the name of the part that holds the average of a width."""
    return f"{AVERAGE_PREFIX}{width:g}"


def width_of(part: str) -> float:
    """Return the width of the average that a part holds."""
    return float(part.removeprefix(AVERAGE_PREFIX))


def average_parts(manifest: Mapping[str, Any]) -> list[str]:
    """Return the parts with power-function averages that a manifest lists."""
    parts = {part_of_file(name) or "" for name in manifest["files"]}
    return sorted(part for part in parts if part.startswith(AVERAGE_PREFIX))


def list_reduced(folder: str) -> list[Checkpoint]:
    """Return the checkpoints in a folder that were reduced to their averages, oldest first."""
    paths = [storage.join(folder, name) for name in storage.list_folders(folder)]
    return sorted(
        (
            Checkpoint(path)
            for path in paths
            if storage.exists(storage.join(path, AVERAGES_FILE))
            and not storage.exists(storage.join(path, MANIFEST_FILE))
        ),
        key=lambda checkpoint: checkpoint.step,
    )


def has_averages(path: str) -> bool:
    """Return whether a folder is a complete checkpoint with averages."""
    try:
        return bool(average_parts(read_checkpoint_manifest(Checkpoint(path))))
    except UserError:  # incomplete, damaged, or of a later version
        return False


def retire(path: str) -> bool:
    """Reduce a checkpoint to its averages, or delete it if it has none or is incomplete.

    ``AVERAGES_FILE`` is written first and the manifest is removed next, so that an interruption
    leaves a complete checkpoint or a reduced one.

    Returns:
        Whether averages remain.

    Raises:
        OSError: that failed.
    """
    if not has_averages(path):
        delete_checkpoint(path)
        return False
    manifest = read_checkpoint_manifest(Checkpoint(path))
    parts = average_parts(manifest)
    kept = {
        name: facts
        for name, facts in manifest["files"].items()
        if name == METADATA_FILE or part_of_file(name) in parts
    }
    text = json.dumps({**manifest, "files": kept}, indent=1) + "\n"
    storage.write_bytes(storage.join(path, AVERAGES_FILE), text.encode())
    others = storage.list_files(path).keys() - {*kept, AVERAGES_FILE}
    for name in sorted(others, key=lambda name: name != MANIFEST_FILE):
        storage.remove(storage.join(path, name))
    return True


def thin_out(folder: str, keep: int) -> list[str]:
    """Delete reduced checkpoints until at most ``keep`` are left; return the deleted paths."""
    steps = [checkpoint.step for checkpoint in list_reduced(folder)]
    paths = [checkpoint_path(folder, step) for step in surplus_steps(steps, keep)]
    for path in paths:
        delete_checkpoint(path)
    return paths


def surplus_steps(steps: Sequence[int], keep: int) -> list[int]:
    """Return the steps to drop so that ``keep`` remain, spread evenly over the run.

    The step whose neighbours are closest to each other is dropped first; the last one is not.
    """
    left, dropped = sorted(steps), []
    while len(left) > max(keep, 1):
        gaps = [after - before for before, after in zip([0, *left], left[1:], strict=False)]
        dropped.append(left.pop(gaps.index(min(gaps))))
    return dropped


def find_averages(folder: str, last: int) -> list[StoredAverages]:
    """Return all stored averages in a folder of checkpoints up to step ``last``, oldest first.

    Raises:
        UserError: a manifest is damaged.
    """
    manifests = [(c, MANIFEST_FILE) for c in list_checkpoints(folder)]
    manifests += [(c, AVERAGES_FILE) for c in list_reduced(folder)]
    found = [
        StoredAverages(checkpoint, read_checkpoint_manifest(checkpoint, name))
        for checkpoint, name in sorted(manifests, key=lambda pair: pair[0].step)
        if 0 < checkpoint.step <= last
    ]
    return [stored for stored in found if stored.parts]


def reconstruct(checkpoint: Checkpoint, width: float) -> PosthocAverage:
    """Combine the stored averages of a run to the average of a width.

    Args:
        checkpoint: at whose step the average is wanted; averages of earlier steps are taken from
            the other folders next to it.
        width: of the average.

    Raises:
        UserError: there are no stored averages, or files are damaged.
    """
    folder = storage.split(checkpoint.path)[0]
    stored = find_averages(folder, checkpoint.step)
    if not stored or stored[-1].checkpoint.step != checkpoint.step:
        raise UserError(
            f"{checkpoint} has no power-function averages: the run must track them from its first "
            "step, with training.posthoc_ema.widths=[0.05,0.1]"
        )
    columns = [(averages, tracked) for averages in stored for tracked in averages.parts]
    keys = [(averages.checkpoint.step, tracked) for averages, tracked in columns]
    found = combine(keys, checkpoint.step, width)
    sources = [
        (averages, averages.parts[tracked], coefficient)
        for (averages, tracked), coefficient in zip(columns, found.coefficients, strict=True)
    ]
    for averages in stored:
        try:
            verify(averages.checkpoint, averages.manifest, parts=tuple(averages.parts.values()))
        except BrokenCheckpointError as error:
            raise UserError(
                f"{error}: delete its folder to combine the other averages, which is less exact"
            ) from error
    verify(checkpoint, stored[-1].manifest, parts=("ema",))
    state = read_parts(checkpoint, ("ema",))["ema"]
    state |= dict(_combined(sources))
    steps = tuple(averages.checkpoint.step for averages in stored)
    return PosthocAverage(state, checkpoint.step, steps, found.error, stored[-1].manifest)


def _combined(
    sources: Sequence[tuple[StoredAverages, str, float]],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weighted sums of stored weights by name; few of them are in memory at a time."""
    averages, part, _ = sources[-1]
    shapes = stored_parts(averages.checkpoint)[part]
    groups: list[list[str]] = [[]]
    for name, tensor in shapes.items():
        size = sum(shapes[other].nbytes for other in groups[-1])
        if groups[-1] and size + tensor.nbytes > _GROUP_BYTES:
            groups.append([])
        groups[-1].append(name)
    with progress_bar(total=len(groups) * len(sources), desc="combine", unit="part") as bar:
        for names in groups:
            sums = {name: torch.zeros(shapes[name].shape, dtype=torch.float64) for name in names}
            for averages, part, coefficient in sources:
                read = {
                    f"{part}/{name}": torch.empty_like(shapes[name], device="cpu") for name in names
                }
                try:
                    load(read, averages.checkpoint.folder)
                except ValueError as error:
                    raise BrokenCheckpointError(
                        f"checkpoint {averages.checkpoint} is broken: {error}"
                    ) from error
                for name in names:
                    sums[name].add_(read[f"{part}/{name}"].double(), alpha=coefficient)
                bar.update()
            yield from ((name, value.to(shapes[name].dtype)) for name, value in sums.items())
