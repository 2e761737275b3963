"""What torchrun tells the processes it starts, one for each device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from rae_xla.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What this process is among those of a run.

    Attributes:
        index: from 0.
        count: how many there are, over all hosts.
        local_index: from 0 on each host; the number of its GPU.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun says of this process; a process that was started without it is alone.

    Raises:
        UserError: there are to be several processes, and something they need is missing.
    """
    count = environment.get("WORLD_SIZE", "1")
    if count == "1":
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    wrong = [name for name in names[:3] if not environment.get(name, "0").isdigit()]
    if missing or wrong:
        what = f"{missing[0]} is not set" if missing else f"{wrong[0]} is no number"
        raise UserError(
            f"WORLD_SIZE is {count}, which says that this is one process of several, but {what}: "
            "start the run with torchrun, which sets all that is needed, or unset WORLD_SIZE"
        )
    rank, size, local = (int(environment[name]) for name in names[:3])
    return Launch(rank, size, local)
