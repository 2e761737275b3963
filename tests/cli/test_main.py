"""The command line around the verbs: lookup, argument parsing and errors."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rae_xla
from rae_xla.cli import main as cli
from rae_xla.errors import UserError


def rae_xla_command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rae_xla", *arguments], capture_output=True, text=True, **options
    )


@pytest.fixture
def verb(monkeypatch):
    """Register a verb ``try`` whose ``act`` a test replaces, and which records its arguments."""

    class Verb:
        given = None

        def act(self, args):
            return 0

        def add_arguments(self, parser):
            parser.add_argument("what")
            parser.add_argument("--steps", type=int)
            parser.add_argument("overrides", nargs="*")

        def run(self, args):
            self.given = args
            return self.act(args)

    verb = Verb()
    monkeypatch.setitem(cli.VERBS, "try", "only in this test")
    monkeypatch.setitem(sys.modules, "rae_xla.cli.try", verb)
    return verb


def test_help_lists_every_verb_and_needs_no_torch():
    code = (
        "import sys\n"
        "from rae_xla.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb, about in cli.VERBS.items():
        assert verb in result.stdout
        assert about in result.stdout


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_a_help_page(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: rae-xla {name}" in capsys.readouterr().out


def test_version_as_a_program():
    assert rae_xla_command("--version").stdout == rae_xla.__version__ + "\n"


def test_no_verb_prints_the_help(capsys):
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("trian", "did you mean 'train'?"), ("shard", "did you mean 'shards'?"), ("zzz", "shards, ")],
)
def test_an_unknown_verb_is_reported_with_the_closest_one(typed, expected, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rae-xla: error: unknown verb '{typed}': ")
    assert expected in error


def test_settings_may_precede_and_follow_options(verb):
    assert cli.main(["try", "stage2", "a.b=1", "--steps", "3", "c.d=2"]) == 0
    assert (verb.given.what, verb.given.steps) == ("stage2", 3)
    assert verb.given.overrides == ["a.b=1", "c.d=2"]


def test_the_status_of_the_verb_is_the_exit_status(verb):
    verb.act = lambda args: 1
    assert cli.main(["try", "x"]) == 1


def test_a_user_error_is_one_line_and_status_2(verb, capsys):
    def fail(args):
        raise UserError("run.yaml: no such file; give --config FILE")

    verb.act = fail
    assert cli.main(["try", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "rae-xla: error: run.yaml: no such file; give --config FILE\n"
    assert captured.out == ""


def test_an_internal_error_keeps_its_traceback(verb):
    def crash(args):
        raise ValueError("a bug")

    verb.act = crash
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["try", "x"])


def test_log_records_go_to_stderr_while_a_verb_runs(verb, capsys):
    logger = logging.getLogger("rae_xla.cli.try")

    def log(args):
        logger.info("reading")
        logger.warning("slow disk")
        return 0

    verb.act = log
    assert cli.main(["try", "x"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "reading\nwarning: slow disk\n"
    assert captured.out == ""
    assert logging.getLogger("rae_xla").handlers == []  # a program that calls main keeps its own


SLEEPER = """
import sys, time, types
from rae_xla.cli import main as cli
verb = types.ModuleType("rae_xla.cli.try")
verb.add_arguments = lambda parser: None
def run(args):
    {body}
verb.run = run
sys.modules["rae_xla.cli.try"] = verb
cli.VERBS["try"] = ""
sys.exit(cli.main(["try"]))
"""


def test_an_interrupt_is_status_130_without_a_traceback():
    code = SLEEPER.format(body="print('started', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "rae-xla: interrupted\n"


@pytest.mark.parametrize("body", ["print('x' * 10**7)", "print('still in the buffer')"])
def test_a_closed_pipe_is_not_an_error(body):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(body=f"time.sleep(0.5); {body}; return 0")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 128 + signal.SIGPIPE
    assert error == b""


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "recon", "--config", "configs/quickstart/stage1.yaml", "--out"),
        ("checkpoints", "export", "run", "--what", "decoder", "--out"),
        ("stats", "--config", "configs/quickstart/stage1.yaml", "--data", "s", "--out"),
    ],
    ids=lambda c: c[0],
)
def test_an_output_that_cannot_be_written_is_reported_before_the_work(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "file/x", "cannot write to the folder"),
    ):
        assert cli.main([*command, str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rae-xla: error: --out")
        assert message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_an_error_of_the_file_system_is_one_line(verb, capsys):
    def fail(args):
        raise OSError(28, "No space left on device", "results/x.npz")

    verb.act = fail
    assert cli.main(["try", "it"]) == 2
    assert capsys.readouterr().err == "rae-xla: error: results/x.npz: No space left on device\n"
