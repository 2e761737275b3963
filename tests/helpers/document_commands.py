"""Find the commands of documents and scripts, and check that this project would accept them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import rae_xla
from rae_xla.cli import main as cli

ROOT = Path(__file__).parents[2]
PROGRAMS = {"rae-xla", "python", "torchrun", "bash"}
OPERATORS = {"&&", "||", "|", ";", "&", "(", ")", ";;"}
BEFORE_A_COMMAND = re.compile(r"[A-Z_]+=.*|do|then|else|if|!|time|exec|nohup")
OURS = re.compile(r"rae-xla|rae_xla|\.sh\b|\.ci/run|\.py\b")


def shell_blocks(document: str) -> str:
    """Return the text of the bash blocks of a document."""
    return "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", document, re.M | re.S))


def commands(script: str) -> Iterator[list[str]]:
    """Yield the simple commands of a shell script as words; variables are replaced by 1."""
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
            continue  # a quotation over several lines is output, not a command
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
    """Raise an AssertionError if the project would reject the command.

    Commands of other programs are ignored.
    """
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
    assert path.is_file(), f"{script} does not exist"
    text = path.read_text()
    for argument in arguments:
        if argument == "--":
            break
        if argument.startswith("--"):
            option = argument.split("=")[0]
            assert option in text, f"{script} has no option {option}"
