"""Findings, and the loop that runs the checks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from rae_xla.config import RunConfig
    from rae_xla.runtime import Backend

Status = Literal["ok", "warn", "FAIL", "none"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        section: heading that it is printed under.
        name: of the thing checked.
        status: ``none`` if there was nothing to check.
        text: description of the result.
        fix: what to do, if there is a problem.
    """

    section: str
    name: str
    status: Status
    text: str
    fix: str | None = None


@dataclass
class DoctorContext:
    """Input of the checks.

    Attributes:
        config: of the run, or the defaults.
        config_given: whether the user gave a configuration; if not, checks of the run are skipped.
        results_dir: results folder, if given.
        backend: set by the check that starts it.
    """

    config: RunConfig
    config_given: bool
    results_dir: str | Path | None
    backend: Backend | None = None


Check = Callable[[DoctorContext], Iterator[Finding]]


def run_checks(
    context: DoctorContext, checks: Mapping[str, Check], on_section: Callable[[str], None]
) -> Iterator[Finding]:
    """Run the checks and yield their findings; a check that raises becomes a failed finding.

    Args:
        context: input of the checks.
        checks: by section, in order.
        on_section: called with each section before its check runs, so that the user sees which
            check hangs.
    """
    for section, check in checks.items():
        on_section(section)
        try:
            yield from check(context)
        except (UserError, OSError) as error:
            yield Finding(section, "", "FAIL", str(error), str(error))
        except Exception as error:  # the remaining checks must still run
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            yield Finding(section, "", "FAIL", text, f"{section}: {text}")
