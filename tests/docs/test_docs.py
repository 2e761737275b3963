"""Every command in the documents exists, with options and settings that exist."""

from __future__ import annotations

import shlex

import pytest
from document_commands import ROOT, check, commands, shell_blocks

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.md")]
SCRIPTS = [*(ROOT / "scripts").rglob("*.sh")]


def problem_with(words: list[str], capsys) -> str:
    """Return what is wrong with a command, or an empty string."""
    try:
        check(words)
    except SystemExit as stop:
        return capsys.readouterr().err if stop.code else ""
    except (AssertionError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_are_valid(path, capsys, monkeypatch):
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
def test_invalid_command_is_detected(command, capsys):
    assert any(problem_with(words, capsys) for words in commands(command))
