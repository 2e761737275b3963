"""Results: have the files of a results folder in a bucket uploaded as they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback
from rae_xla.train.metrics_window import DeviceMetrics, WindowSummary
from rae_xla.train.remote_results import ResultsUpload

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer


HANG_TIMEOUT = 10.0
"""Seconds that a hanging process waits until its report has been uploaded."""


class ResultsCallback(Callback):
    """Requests an upload after every log line, and of the report of a hang.

    Args:
        upload: of the results folder.
    """

    def __init__(self, upload: ResultsUpload) -> None:
        self._upload = upload

    def on_train_start(self, trainer: Trainer) -> None:
        """Upload the files that describe the run, and the report of a hang if there is one."""
        self._upload.request()
        trainer.run.watchdog.on_hang = self._with_upload(trainer.run.watchdog.on_hang)

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Stop if another run has taken the folder over.

        Raises:
            UserError: it has.
        """
        if self._upload.lost is not None:
            raise self._upload.lost

    def on_log(self, trainer: Trainer, summary: WindowSummary) -> None:
        """Upload the line, and whatever else was written since the last one."""
        self._upload.request()

    def _with_upload(self, report: Callable[[str], None] | None) -> Callable[[str], None]:
        def upload() -> None:
            with suppress(Exception):  # the process ends in any case
                self._upload.upload()

        def report_and_upload(text: str) -> None:
            if report is not None:
                report(text)
            # In a thread, because the process must end even if the bucket is what it hangs on.
            thread = threading.Thread(target=upload, name="upload after a hang", daemon=True)
            thread.start()
            thread.join(HANG_TIMEOUT)

        return report_and_upload
