"""Sharding rules as data: which dimension of which parameter is split over which mesh axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PartitionSpec = tuple[str | None, ...]


@dataclass(frozen=True)
class ShardingRule:
    """Parameters whose name matches ``pattern`` are split over ``axis``, along the first of
    ``dims`` that divides evenly; an empty ``dims`` keeps a copy on every device.
    """

    pattern: str
    dims: tuple[int, ...]
    axis: str = "fsdp"


# A linear's weight is (out, in): its output features are split, so that gathering it gives the
# layer whole. Vectors are small: splitting them costs more collectives than the bytes they save.
# The frozen networks of the stage-1 losses have no optimizer state: a copy of them on each device
# (140 MB in fp32) costs less than gathering them at every step.
FSDP_RULES = (
    ShardingRule(r"^(lpips|backbone)\.", ()),
    ShardingRule(r"\.(bias|lambda1)$|norm[^.]*\.weight$", ()),
    ShardingRule(r".*", (0, 1)),
)


def partition_spec(
    name: str, shape: Sequence[int], rules: Sequence[ShardingRule], axis_sizes: dict[str, int]
) -> PartitionSpec:
    """The partition spec of one parameter: for every dimension the mesh axis that splits it.

    The first rule whose pattern is found in ``name`` decides. Vectors and scalars stay whole.
    """
    whole: PartitionSpec = (None,) * len(shape)
    if len(shape) < 2:
        return whole
    for rule in rules:
        if re.search(rule.pattern, name):
            for dim in rule.dims:
                if dim < len(shape) and shape[dim] % axis_sizes[rule.axis] == 0:
                    return tuple(rule.axis if d == dim else None for d in range(len(shape)))
            return whole
    return whole
