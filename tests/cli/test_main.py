"""The command line around the verbs: finding them, and what goes wrong."""

from __future__ import annotations

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
    """Put a verb of the test's own in the table: what it is to do, and what it was given."""

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
def test_every_verb_explains_itself(name, capsys):
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
def test_unknown_verb_names_the_nearest(typed, expected, capsys):
    assert cli.main([typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rae-xla: error: unknown verb '{typed}': ")
    assert expected in error


def test_settings_may_stand_before_and_after_options(verb):
    assert cli.main(["try", "stage2", "a.b=1", "--steps", "3", "c.d=2"]) == 0
    assert (verb.given.what, verb.given.steps) == ("stage2", 3)
    assert verb.given.overrides == ["a.b=1", "c.d=2"]


def test_the_status_of_the_verb_is_the_status(verb):
    verb.act = lambda args: 1
    assert cli.main(["try", "x"]) == 1


def test_a_user_error_is_one_line_and_status_2(verb, capsys):
    def refuse(args):
        raise UserError("run.yaml: no such file; give --config FILE")

    verb.act = refuse
    assert cli.main(["try", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "rae-xla: error: run.yaml: no such file; give --config FILE\n"
    assert captured.out == ""


def test_a_fault_of_ours_keeps_its_traceback(verb):
    def crash(args):
        raise ValueError("not the user's")

    verb.act = crash
    with pytest.raises(ValueError, match="not the user's"):
        cli.main(["try", "x"])


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


@pytest.mark.parametrize("body", ["print('x' * 10**7)", "print('held in the buffer')"])
def test_a_reader_that_leaves_is_no_error(body):
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
        ("evaluate", "recon", "--config", "c.yaml", "--out"),
        ("export", "decoder", "--ckpt", "c.pt", "--out"),
        ("stats", "--config", "configs/quickstart/stage1.yaml", "--data", "s", "--out"),
    ],
    ids=lambda c: c[0],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parents[2])
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file/x", "cannot be made")):
        assert cli.main([*command, str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rae-xla: error: --out")
        assert message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_what_the_file_system_refuses_is_one_line(verb, capsys):
    def refuse(args):
        raise OSError(28, "No space left on device", "results/x.npz")

    verb.act = refuse
    assert cli.main(["try", "it"]) == 2
    assert capsys.readouterr().err == "rae-xla: error: results/x.npz: No space left on device\n"
