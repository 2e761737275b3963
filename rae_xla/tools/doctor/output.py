"""Output of findings as text and JSON, and their exchange between hosts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rae_xla.errors import UserError
from rae_xla.runtime import Backend
from rae_xla.tools.doctor.finding import Finding

_MARKS = {"ok": "ok  ", "warn": "warn", "FAIL": "FAIL", "none": " -  "}
_PROBLEMS = ("warn", "FAIL")

OTHER_HOSTS = "other hosts"


def format_finding(finding: Finding) -> str:
    """Return a finding as a line of text."""
    name = f"{finding.name}: " if finding.name else ""
    return f"  {_MARKS[finding.status]}  {name}{finding.text}"


def fixes(findings: Iterable[Finding]) -> list[str]:
    """Return what to do about the problems, failures first."""
    found = [f for f in findings if f.status in _PROBLEMS]
    found.sort(key=lambda finding: finding.status != "FAIL")
    return [f"{f.status}: {f.fix or f.text}" for f in found]


def findings_json(findings: Sequence[Finding]) -> str:
    """Return a JSON object with the host, all ``findings``, the list ``fix``, and ``ok``."""
    content = {
        "host": socket.gethostname(),
        "findings": [asdict(finding) for finding in findings],
        "fix": fixes(findings),
        "ok": passed(findings),
    }
    return json.dumps(content, indent=1)


def passed(findings: Iterable[Finding]) -> bool:
    """Return whether no check failed; warnings are not failures."""
    return all(finding.status != "FAIL" for finding in findings)


def problems_of_other_hosts(backend: Backend, own: Iterable[Finding]) -> list[Finding]:
    """Return the problems that other processes found; every process must call this.

    Args:
        backend: of the run.
        own: findings of this process.
    """
    problems = [asdict(finding) for finding in own if finding.status in _PROBLEMS]
    message = json.dumps({"host": socket.gethostname(), "problems": problems})
    found: list[Finding] = []
    try:
        texts = backend.all_gather_text(message)
    except UserError as error:
        return [Finding(OTHER_HOSTS, "", "FAIL", str(error), str(error))]
    for process, text in enumerate(texts):
        host = json.loads(text)
        if process == backend.process_index:
            continue
        name = f"{host['host']} (process {process})"
        for problem in host["problems"]:
            fix = f"on {name}: {problem['fix'] or problem['text']}"
            text = f"{problem['section']} {problem['name']}: {problem['text']}"
            found.append(Finding(OTHER_HOSTS, name, problem["status"], text, fix))
    return found
