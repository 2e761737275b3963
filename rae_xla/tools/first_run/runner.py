"""A first run: all sections one after another, within a time limit, into one file."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rae_xla.sample.tiny_model import write_tiny_model
from rae_xla.tools.first_run.planned import ROWS_WITHOUT_PLAN, SMOKE_ROWS
from rae_xla.tools.first_run.section import SectionJob
from rae_xla.tools.first_run.settings import FirstRun
from rae_xla.version import __version__

logger = logging.getLogger(__name__)

TASKS = ("stage2", "stage1")
"""The tasks whose steps are measured."""

SAMPLING_ROWS = 16
"""Images per device of a batch of samples."""

_OUTPUT = 3000  # characters of a failed section's output to keep


@dataclass
class Section:
    """What one section found.

    Attributes:
        title: for display.
        status: ``passed``, ``failed`` (a comparison failed), ``error`` or ``skipped``.
        seconds: that it took.
        content: its result.
        message: why it did not pass.
    """

    title: str
    status: str
    seconds: float = 0.0
    content: dict[str, Any] = field(default_factory=dict)
    message: str = ""

    @property
    def line(self) -> str:
        """The section in one line."""
        text = f"{self.status:<8}{self.seconds:6.0f} s  {self.title}"
        return f"{text}: {self.message.strip().splitlines()[-1]}" if self.message else text


class _Runner:
    def __init__(self, run: FirstRun) -> None:
        self._run, self._start = run, time.monotonic()
        self.sections: list[Section] = []

    def section(
        self, title: str, name: str, options: Mapping[str, Any], *, together: bool = True
    ) -> dict[str, Any]:
        """Run one section; returns its result, empty if it has none.

        Args:
            title: for display.
            name: key of ``section.SECTIONS``.
            options: its arguments.
            together: whether it runs on all devices; else in one process.
        """
        folder = Path(self._run.folder)
        out = folder / f"section-{len(self.sections)}.json"
        job = SectionJob(name, asdict(self._run), str(out), dict(options))
        job_file = out.with_suffix(".job")
        job_file.write_text(json.dumps(asdict(job)))
        out.unlink(missing_ok=True)
        prefix = launcher(self._run.devices if together else 1)
        command = [*prefix, "-m", "rae_xla.tools.first_run.section", str(job_file)]
        return self._record(title, command, lambda: json.loads(out.read_text()))

    def doctor(self) -> None:
        """Run ``rae-xla doctor``."""
        command = [sys.executable, "-m", "rae_xla", "doctor", "--json", *self._run.runtime]
        self._record("doctor", command, None)

    def _record(self, title: str, command: list[str], read: Any) -> dict[str, Any]:
        start = time.monotonic()
        left = self._run.budget - (start - self._start)
        if left <= 0:
            section = Section(title, "skipped", message="no time is left")
        else:
            code, output = _run(command, left)
            seconds = time.monotonic() - start
            if read is None:  # the doctor prints its findings
                section = _doctor_section(title, code, output, seconds)
            elif code != 0:
                section = Section(title, "error", seconds, message=output[-_OUTPUT:])
            else:
                content = read()
                passed = content.get("passed", True)
                section = Section(title, "passed" if passed else "failed", seconds, content)
        self.sections.append(section)
        logger.info("%s", section.line)
        return section.content


def run_all(run: FirstRun, out: Path) -> list[Section]:
    """Run all sections and write the file.

    Args:
        run: the first run.
        out: the file, JSON.
    """
    tiny = run.tiny_model.parent
    tiny.mkdir(parents=True, exist_ok=True)
    write_tiny_model(tiny)
    runner = _Runner(run)
    devices = runner.section("devices", "devices", {})
    runner.doctor()
    for precision in ("fp32",) if run.smoke else ("fp32", "bf16"):
        title = f"parity with recorded numbers, {precision}"
        runner.section(title, "parity", {"precision": precision})
    command = [*launcher(run.devices), "-m", "rae_xla"]
    runner.section("save and resume", "resume", {"command": command}, together=False)
    for task in TASKS:
        planned = _plan(runner, run, task, devices)
        rows = planned.get("rows", SMOKE_ROWS if run.smoke else ROWS_WITHOUT_PLAN[task])
        runner.section(f"step of {task}", "steps", {"task": task, "rows": rows})
        runner.sections[-1].content["planned"] = planned
    rows = SMOKE_ROWS if run.smoke else SAMPLING_ROWS
    runner.section("sampling modes", "sampling", {"rows": rows})
    content = {
        "version": __version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "smoke": run.smoke,
        "summary": [section.line for section in runner.sections] + _measured(runner.sections),
        "sections": [asdict(section) for section in runner.sections],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    for line in _measured(runner.sections):
        logger.info("%s", line)
    return runner.sections


def launcher(devices: int) -> list[str]:
    """Return the command that starts a Python module on a number of devices."""
    if devices == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(devices)]  # fmt: skip


def _plan(runner: _Runner, run: FirstRun, task: str, devices: Mapping[str, Any]) -> dict[str, Any]:
    name, count = devices.get("accelerator"), devices.get("count", 1)
    if name is not None and name.startswith("TPU"):
        options = {"task": task, "name": name, "chips": count}
        return runner.section(f"plan of {task}", "plan_tpus", options, together=False)
    if name is None and not run.smoke:
        return {}
    options = {"task": task, "name": name or "", "gpus": count}
    return runner.section(f"plan of {task}", "plan_gpus", options, together=False)


def _measured(sections: list[Section]) -> list[str]:
    """Return the measured steps next to the planned ones, a line each."""
    lines = []
    for section in sections:
        found, planned = section.content, section.content.get("planned")
        if planned is None or "step_s" not in found:
            continue
        parts = [f"{section.title}: {found['rows_per_device']} images per device"]
        parts.append(f"{found['step_s']:.3f} s" + _range(planned.get("step_s")))
        if found["mfu"] is not None:
            parts.append(f"MFU {found['mfu']:.1%}")
        if found["peak_bytes"]:
            text = f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
            if "peak_bytes" in planned:
                text += f" (planned {planned['peak_bytes'] / 2**30:.2f})"
            parts.append(text)
        lines.append(", ".join(parts))
    return lines


def _range(seconds: list[float | None] | None) -> str:
    if not seconds:
        return ""
    low, high = seconds
    if high is None:
        return f" (planned at least {low:.3f})"
    return f" (planned {low:.3f} to {high:.3f})"


def _doctor_section(title: str, code: int, output: str, seconds: float) -> Section:
    begin = output.find("{")
    try:
        content, _ = json.JSONDecoder().raw_decode(output[max(begin, 0) :])
    except ValueError:
        return Section(title, "error", seconds, message=output[-_OUTPUT:])
    return Section(title, "passed" if code == 0 else "failed", seconds, content)


def _run(command: list[str], timeout: float) -> tuple[int, str]:
    """Run a command and return its status and output; end all its processes at the timeout."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 1, f"stopped after {timeout:.0f} s, when the time for the first run was over"
        output.seek(0)
        return code, output.read()
