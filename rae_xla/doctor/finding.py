"""What a check finds, and how checks are run: each for itself."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rae_xla.config import RunConfig
    from rae_xla.runtime import Runtime

Status = Literal["ok", "warn", "FAIL", "none"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: it stands under.
        name: what was looked at.
        status: ``none`` where there was nothing to look at.
        text: what was found.
        fix: what to do, where something is wrong.
    """

    section: str
    name: str
    status: Status
    text: str
    fix: str | None = None


@dataclass
class Patient:
    """What is examined.

    Attributes:
        config: of the run, or the defaults.
        named: whether a configuration was given; without one, what only it can say is left out.
        results: the results folder, if given.
        runtime: the devices, once they have been started.
    """

    config: RunConfig
    named: bool
    results: Path | None
    runtime: Runtime | None = None


Check = Callable[[Patient], Iterator[Finding]]


def examine(
    patient: Patient, checks: Mapping[str, Check], begin: Callable[[str], None]
) -> Iterator[Finding]:
    """The findings of checks by section, as they come. One that breaks is a finding like others.

    ``begin`` is told each section before its check is run: if that hangs, one knows which.
    """
    for section, check in checks.items():
        begin(section)
        try:
            yield from check(patient)
        except (UserError, OSError) as error:
            yield Finding(section, "", "FAIL", str(error), str(error))
        except Exception as error:  # the others must still be run
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            yield Finding(section, "", "FAIL", text, f"{section}: {text}")
