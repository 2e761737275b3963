"""Where a run's figures go: ``metrics.jsonl`` always, the console, and wandb when asked for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rae_xla.sample.pictures import Pixels, save_png
from rae_xla.train.figures import SKIPPED
from rae_xla.train.rollback import SkippedStepsError
from rae_xla.train.wandb_sink import WandbSink

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


class Tracker:
    """Writes figures and pictures of one run. Of several processes, one speaks.

    Args:
        folder: the results folder.
        config: of the run.
        start: steps taken before.
        total: steps of the whole run.
        speaks: whether this process does.
        facts: what else wandb is to show of the run, by name (``run_facts.describe_start``).
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        start: int,
        total: int,
        speaks: bool = True,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the run's files; on a resume, drop the lines of steps that will run again."""
        self._folder, self._speaks, self._total = folder, speaks, total
        path = folder / "metrics.jsonl" if speaks else Path(os.devnull)
        if speaks:
            _drop_lines_after(path, start)
        self._file = path.open("a", encoding="utf-8")
        hidden = not (speaks and sys.stderr.isatty())
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, disable=hidden
        )
        self._wandb: WandbSink | None = None
        if speaks and config.tracking.wandb:
            shown = {**config.to_dict(), **(facts or {})}
            try:
                self._wandb = WandbSink(folder, config.tracking, shown, self._print)
            except OSError as error:
                self._print(f"wandb: {error}; going on without it (metrics.jsonl has everything)")

    def advance(self) -> None:
        """One step more on the progress bar."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        self._print(line)
        if self._wandb is not None:
            self._wandb.put("say", line=line)

    def _print(self, line: str) -> None:
        if self._speaks:
            tqdm.write(line, file=sys.stderr)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures under their names (``figures.FIGURES``)."""
        line = {"step": step, **figures}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.say(_console_line(step, self._total, figures))
        if self._wandb is not None:
            self._wandb.put("log", step=step, figures=dict(figures))
        if skipped := sum(v for name, v in figures.items() if name.endswith(SKIPPED)):
            text = f"step {step}: {skipped:g} since the line before had no finite loss or gradient"
            self.alert("Steps are skipped", text)

    def images(self, step: int, name: str, grid: Pixels, caption: str = "") -> None:
        """Save an (H, W, 3) uint8 picture as ``samples/<name>-<step>.png``."""
        if not self._speaks:
            return
        path = self._folder / "samples" / f"{name}-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
        except OSError as error:  # a picture is not worth a run
            self.say(f"step {step}: {path} could not be written: {error}")
            return
        if self._wandb is not None:
            caption = f"step {step}: {caption}" if caption else f"step {step}"
            place = str(path.resolve())
            self._wandb.put("image", step=step, name=f"samples/{name}", path=place, caption=caption)

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Have wandb write to those who follow the run, of one title once an hour at most.

        Args:
            title: what happened.
            text: the same in full.
            level: ``INFO``, ``WARN`` or ``ERROR``.
        """
        if self._wandb is not None:
            self._wandb.put("alert", title=title, text=text, level=level, pause=ALERT_PAUSE)

    def stopping(self, step: int, reason: str) -> None:
        """The run was told to stop, and is about to."""
        if self._wandb is not None:
            self.alert("Told to stop", f"step {step}: {reason}; it can be started again")
            self._wandb.put("preempting")

    def stalled(self, text: str) -> None:
        """The process is about to be ended because nothing moves; called by the watchdog."""
        if self._wandb is not None:
            self.alert("Nothing moves", text, "ERROR")
            self._wandb.flush(HANDING_OVER)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, SkippedStepsError):
            text = f"{error}: the run goes back to its newest good checkpoint, if it has one"
            self.alert("Steps keep being skipped", text, "ERROR")
        elif isinstance(error, Exception):
            self.alert("Training failed", str(error) or type(error).__name__, "ERROR")
        self.close(failed=error is not None)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(int(failed))


ALERT_PAUSE = 3600.0
"""Seconds between two alerts of the same title."""

HANDING_OVER = 2.0
"""Seconds for which a process that hangs waits for its last words to be taken."""

_PLAIN_ON_CONSOLE = ("train", "opt", "perf")
_SILENT_AT_ZERO = ("skipped", "fallbacks", "compilations", "bad_samples", "paused")
_NOT_ON_CONSOLE = ("images_per_second_per_chip", "host_memory_gb")


def _console_line(step: int, total: int, figures: Mapping[str, float]) -> str:
    """With the time that the steps to come will take, as they take now."""
    shown = {}
    for name, value in figures.items():
        room, _, rest = name.partition("/")
        word = rest.rpartition("/")[2]
        if word not in _NOT_ON_CONSOLE and (value or word not in _SILENT_AT_ZERO):
            shown[rest if room in _PLAIN_ON_CONSOLE else name] = value
    words = [f"{name} {value:.4g}" for name, value in shown.items()]
    if (seconds := figures.get("perf/step_time")) is not None and step < total:
        words.append(f"left {tqdm.format_interval((total - step) * seconds)}")
    return f"step {step:>7d}/{total}  " + "  ".join(words)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    unfinished.replace(path)
