"""What was found, for people and for programs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rae_xla.doctor.finding import Finding
from rae_xla.errors import UserError
from rae_xla.runtime import Runtime

_MARKS = {"ok": "ok  ", "warn": "warn", "FAIL": "FAIL", "none": " -  "}
_TROUBLE = ("warn", "FAIL")

ELSEWHERE = "other hosts"


def line(finding: Finding) -> str:
    """A finding as a line under its section."""
    name = f"{finding.name}: " if finding.name else ""
    return f"  {_MARKS[finding.status]}  {name}{finding.text}"


def what_to_fix(findings: Iterable[Finding]) -> list[str]:
    """What to do, the failures first."""
    found = [f for f in findings if f.status in _TROUBLE]
    found.sort(key=lambda finding: finding.status != "FAIL")
    return [f"{f.status}: {f.fix or f.text}" for f in found]


def as_json(findings: Sequence[Finding]) -> str:
    """``findings`` as they are, ``fix`` as a list of what to do, and ``ok``."""
    content = {
        "host": socket.gethostname(),
        "findings": [asdict(finding) for finding in findings],
        "fix": what_to_fix(findings),
        "ok": healthy(findings),
    }
    return json.dumps(content, indent=1)


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed; a warning is no failure."""
    return all(finding.status != "FAIL" for finding in findings)


def troubles_elsewhere(runtime: Runtime, own: Iterable[Finding]) -> list[Finding]:
    """What went wrong on the other hosts; every process must call it."""
    mine = [asdict(finding) for finding in own if finding.status in _TROUBLE]
    said = json.dumps({"host": socket.gethostname(), "troubles": mine})
    found: list[Finding] = []
    try:
        texts = runtime.exchange(said)
    except UserError as error:
        return [Finding(ELSEWHERE, "", "FAIL", str(error), str(error))]
    for process, text in enumerate(texts):
        host = json.loads(text)
        if process == runtime.process_index:
            continue
        name = f"{host['host']} (process {process})"
        for trouble in host["troubles"]:
            fix = f"on {name}: {trouble['fix'] or trouble['text']}"
            text = f"{trouble['section']} {trouble['name']}: {trouble['text']}"
            found.append(Finding(ELSEWHERE, name, trouble["status"], text, fix))
    return found
