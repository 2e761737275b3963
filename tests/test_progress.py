"""Log lines and progress bars, in a terminal and in a log file."""

import io
import logging

import pytest

from rae_xla.progress import (
    configure_logging,
    log_only_on_first_process,
    progress_bar,
    reset_logging,
)

logger = logging.getLogger("rae_xla.some.module")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def console():
    configure_logging()
    yield
    reset_logging()


def test_progress_in_a_log_file_is_written_as_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(progress_bar(range(3), desc="sample", unit="step")) == [0, 1, 2]
    with progress_bar(desc="read", total=200, unit="B", leave=False) as bar:
        for _ in range(200):
            bar.update()
    first, last, *others = log.getvalue().splitlines()
    assert first.startswith("sample:   0% 0/3 [")
    assert last.startswith("sample: 100% 3/3 [")
    assert [line.split(" [")[0] for line in others] == ["read:   0% 0/200", "read: 100% 200/200"]
    assert not set(log.getvalue()) & set("\r\x1b")


def test_progress_in_a_log_file_is_written_periodically(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("rae_xla.progress.SECONDS_BETWEEN_LINES", 0)
    with progress_bar(total=3) as bar:
        for _ in range(3):
            bar.update()
    shown = dict.fromkeys(line.split()[0] for line in log.getvalue().splitlines())
    assert list(shown) == ["0%", "33%", "67%", "100%"]


def test_progress_in_a_terminal_is_redrawn_in_place(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert terminal.getvalue().count("\n") == 1
    assert "\r100%|" in terminal.getvalue()


def test_disabled_progress_writes_nothing(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert not log.getvalue()


def test_log_records_go_to_stderr_with_their_level(console, capsys):
    configure_logging()  # a second call adds no second handler
    logger.debug("dropped")
    logger.info("step %d", 3)
    logger.warning("a slow disk")
    logger.error("a full disk")
    captured = capsys.readouterr()
    assert captured.err == "step 3\nwarning: a slow disk\nerror: a full disk\n"
    assert captured.out == ""


def test_log_lines_do_not_break_a_progress_bar(console, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(total=2) as bar:
        bar.update()
        logger.info("between two steps")
    assert "\rbetween two steps\n" in terminal.getvalue()


def test_only_the_first_process_logs_below_warning(console, capsys):
    log_only_on_first_process(0)
    logger.info("first")
    log_only_on_first_process(1)
    logger.info("second")
    logger.warning("second")
    assert capsys.readouterr().err == "first\nwarning: second\n"


def test_reset_logging_leaves_the_logger_as_it_was(caplog):
    configure_logging()
    reset_logging()
    with caplog.at_level(logging.INFO, logger="rae_xla"):
        logger.info("to pytest")
    assert caplog.messages == ["to pytest"]
