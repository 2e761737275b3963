"""Every command in the documents is one that exists, with options and settings that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import rae_xla
from rae_xla.cli import main as cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.md")]
SCRIPTS = [*(ROOT / "scripts").rglob("*.sh")]
PROGRAMS = {"rae-xla", "python", "torchrun", "bash"}
OPERATORS = {"&&", "||", "|", ";", "&", "(", ")", ";;"}
BEFORE_A_COMMAND = re.compile(r"[A-Z_]+=.*|do|then|else|if|!|time|exec|nohup")
OURS = re.compile(r"rae-xla|rae_xla|\.sh\b|\.ci/run|\.py\b")


def shell_blocks(document: str) -> str:
    """The text of the document's bash blocks."""
    return "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", document, re.M | re.S))


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words, with 1 for the value of a variable."""
    for line in script.replace("\\\n", " ").splitlines():
        if not OURS.search(line):
            continue
        line = re.sub(r'"?\$\{?python\}?"?', "python", line.strip().removeprefix("$ "))
        line = re.sub(r"\$(\w+|\{[^}]*\}|[@*#?])", "1", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = [*lexer, ";"]
        except ValueError:
            continue  # a quotation over several lines: something said, not something run
        words: list[str] = []
        for token in tokens:
            if token in OPERATORS:
                while words and BEFORE_A_COMMAND.fullmatch(words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(token)


def check(words: list[str]) -> None:
    """Raise an AssertionError if the command is of this project and would not be understood."""
    words = [word.removeprefix(".venv/bin/") for word in words]
    for i, word in enumerate(words):
        if set(word) <= set("<>&"):
            words = words[: i - (words[i - 1] == "2")]  # the 2 of 2>file too
            break
    programs = [i for i, word in enumerate(words) if word in PROGRAMS or word.endswith(".sh")]
    if not programs:
        return
    program, *rest = words[programs[0] :]
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(rest)
        assert options.module
        program, rest = "python", ["-m", options.training_script, *options.training_script_args]
    if program == "python" and rest[:2] == ["-m", "rae_xla"]:
        program, rest = "rae-xla", rest[2:]
    if program == "rae-xla":
        check_verb(rest)
    elif program.endswith(".sh"):
        check_script(program, rest)
    elif rest and not rest[0].startswith("-"):
        check_script(rest[0], rest[1:])


def check_verb(arguments: list[str]) -> None:
    if arguments[0].startswith("-"):
        cli.main_parser().parse_args(arguments)
        return
    args = cli.parse_verb(arguments[0], arguments[1:])
    config = getattr(args, "config", None)
    if config and (str(config).startswith("configs/") or (ROOT / config).exists()):
        rae_xla.load_config(ROOT / config, overrides=getattr(args, "overrides", []))


def check_script(script: str, arguments: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    text = path.read_text()
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--"):
            option = argument.split("=")[0]
            assert option in text, f"{script} has no option {option}"


def problem_with(words: list[str], capsys) -> str:
    """What is wrong with a command; empty if nothing is."""
    try:
        check(words)
    except SystemExit as stop:
        return capsys.readouterr().err if stop.code else ""
    except (AssertionError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_understood(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    script = text if path.suffix == ".sh" else shell_blocks(text)
    problems = {shlex.join(c): p for c in commands(script) if (p := problem_with(c, capsys))}
    assert problems == {}


@pytest.mark.parametrize(
    "command",
    [
        "rae-xla trian stage2",
        "rae-xla train stage3 --config run.yaml --results-dir r",
        "rae-xla train stage2 --config configs/none.yaml --results-dir r",
        "rae-xla sample --no-such-option",
        "X=1 python -m rae_xla shards verify",
        "if ! .venv/bin/rae-xla sample --config $config; then exit 1; fi",
        "timeout 60 rae-xla shards make",
        '"$python" scripts/none.py > log 2>&1',
        "cd here && bash scripts/none.sh",
        "bash scripts/test.sh --no-such-option",
        "torchrun --nproc-per-node 2 -m rae_xla train stage3 --config run.yaml --results-dir r",
        "torchrun --no-such-option 2 -m rae_xla sample",
    ],
)
def test_a_wrong_command_is_found(command, capsys):
    assert any(problem_with(words, capsys) for words in commands(command))
