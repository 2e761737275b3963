"""Tracker: writes metrics and images to the results folder, the console and Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rae_xla.sample.images import Pixels, save_png
from rae_xla.train.metrics import SKIPPED
from rae_xla.train.rollback import SkippedStepsError
from rae_xla.train.tracking.wandb_sink import WandbSink

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

logger = logging.getLogger(__name__)

ALERT_INTERVAL = 3600.0
"""Seconds between two alerts with the same title."""

FLUSH_TIMEOUT = 2.0
"""Seconds that a hanging process waits until its last messages have been sent to wandb."""

_UNPREFIXED_GROUPS = ("train", "opt", "perf")
_HIDDEN_AT_ZERO = ("skipped", "fallbacks", "compilations", "bad_samples", "paused")
_NOT_ON_CONSOLE = ("images_per_second_per_chip", "host_memory_gb", "captures")


class Tracker:
    """Records the metrics and images of one run; ``metrics.jsonl`` always has all of them.

    Of several processes only the main one writes. While the tracker is open, the log records of the
    package are sent to wandb as well.

    Args:
        folder: the results folder.
        config: of the run.
        start: steps taken so far. On a resume, the lines of steps that run again are dropped.
        total: steps of the whole run.
        is_main: whether this process writes.
        run_info: shown by wandb in addition to the configuration (``run_info.describe_run``).
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        *,
        start: int,
        total: int,
        is_main: bool = True,
        run_info: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._is_main, self._total = folder, is_main, total
        path = folder / "metrics.jsonl" if is_main else Path(os.devnull)
        if is_main:
            _drop_lines_after(path, start)
        self._file = path.open("a", encoding="utf-8")
        # Only in a terminal: in a log file the lines of metrics show the progress.
        hidden = not (is_main and sys.stderr.isatty())
        self._bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, disable=hidden
        )
        self._wandb: WandbSink | None = None
        self._handler: _WandbHandler | None = None
        if is_main and config.tracking.wandb:
            shown = {**config.to_dict(), **(run_info or {})}
            try:
                self._wandb = WandbSink(folder, config.tracking, shown)
            except OSError as error:
                logger.warning(
                    "wandb: %s; the run continues without it (metrics.jsonl has everything)", error
                )
            else:
                self._handler = _WandbHandler(self._wandb)
                logging.getLogger("rae_xla").addHandler(self._handler)

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by name (``metrics.METRICS``)."""
        line = {"step": step, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._is_main:
            logger.info(_console_line(step, self._total, metrics))
        if self._wandb is not None:
            self._wandb.send("log", step=step, metrics=dict(metrics))
        if skipped := sum(v for name, v in metrics.items() if name.endswith(SKIPPED)):
            text = (
                f"step {step}: {skipped:g} steps since the previous line were skipped: their loss "
            )
            self.alert("Steps are skipped", text + "or gradient was not usable")

    def image(self, step: int, name: str, grid: Pixels, caption: str = "") -> None:
        """Save an image, (H, W, 3) uint8, as ``samples/<name>-<step>.png``."""
        if not self._is_main:
            return
        path = self._folder / "samples" / f"{name}-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
        except OSError as error:  # a preview must not end a run
            logger.warning("step %d: cannot write %s: %s", step, path, error)
            return
        if self._wandb is not None:
            caption = f"step {step}: {caption}" if caption else f"step {step}"
            self._wandb.send(
                "image",
                step=step,
                name=f"samples/{name}",
                path=str(path.resolve()),
                caption=caption,
            )

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send a wandb alert, at most one per title and hour.

        Args:
            title: what happened.
            text: the details.
            level: ``INFO``, ``WARN`` or ``ERROR``.
        """
        if self._wandb is not None:
            self._wandb.send("alert", title=title, text=text, level=level, pause=ALERT_INTERVAL)

    def mark_preempting(self, step: int, reason: str) -> None:
        """Notify wandb that the run is about to stop and can be resumed."""
        if self._wandb is not None:
            self.alert("Run is stopping", f"step {step}: {reason}; the run can be resumed")
            self._wandb.send("preempting")

    def report_hang(self, text: str) -> None:
        """Send an alert before the watchdog ends the process."""
        if self._wandb is not None:
            self.alert("Run hangs", text, "ERROR")
            self._wandb.flush(FLUSH_TIMEOUT)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Flush and close everything.

        Args:
            error: the exception that ends the run, if any; wandb marks the run as failed.
        """
        if isinstance(error, SkippedStepsError):
            text = f"{error}: rolling back to the newest checkpoint before them, if there is one"
            self.alert("Steps keep being skipped", text, "ERROR")
        elif isinstance(error, Exception):
            self.alert("Training failed", str(error) or type(error).__name__, "ERROR")
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.close(int(error is not None))
        if self._handler is not None:
            logging.getLogger("rae_xla").removeHandler(self._handler)


class _WandbHandler(logging.Handler):
    """Sends log records to wandb's console log, except those about wandb itself."""

    def __init__(self, sink: WandbSink) -> None:
        super().__init__(logging.INFO)
        self._sink = sink
        self.addFilter(lambda record: not record.name.endswith("wandb_sink"))

    def emit(self, record: logging.LogRecord) -> None:
        self._sink.send("print", line=self.format(record))


def _console_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """Format metrics for the console, with the estimated time left."""
    shown = {}
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        last = rest.rpartition("/")[2]
        if last not in _NOT_ON_CONSOLE and (value or last not in _HIDDEN_AT_ZERO):
            shown[rest if group in _UNPREFIXED_GROUPS else name] = value
    fields = [f"{name} {value:.4g}" for name, value in shown.items()]
    if (seconds := metrics.get("perf/step_time")) is not None and step < total:
        fields.append(f"left {tqdm.format_interval((total - step) * seconds)}")
    return f"step {step:>7d}/{total}  " + "  ".join(fields)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; also drops a line that was cut short by a kill."""
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
