"""Progress of long work: what a log file gets of it, and a terminal."""

import io

from rae_xla.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_log_file_by_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(progress_bar(range(3), desc="draw", unit="step")) == [0, 1, 2]
    with progress_bar(desc="read", total=200, unit="B", leave=False) as bar:
        for _ in range(200):
            bar.update()
    first, last, *others = log.getvalue().splitlines()
    assert first.startswith("draw:   0% 0/3 [")
    assert last.startswith("draw: 100% 3/3 [")
    assert [line.split(" [")[0] for line in others] == ["read:   0% 0/200", "read: 100% 200/200"]
    assert not set(log.getvalue()) & set("\r\x1b")


def test_in_a_log_file_now_and_then(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr("rae_xla.progress.SECONDS_BETWEEN_LINES", 0)
    with progress_bar(total=3) as bar:
        for _ in range(3):
            bar.update()
    shown = dict.fromkeys(line.split()[0] for line in log.getvalue().splitlines())
    assert list(shown) == ["0%", "33%", "67%", "100%"]


def test_in_a_terminal_over_what_stood_there(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert terminal.getvalue().count("\n") == 1
    assert "\r100%|" in terminal.getvalue()


def test_unless_it_is_not_wanted(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    assert not log.getvalue()
