"""What the page of troubles quotes is what the programs say."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/troubleshooting.md"


def said() -> str:
    """Every piece of literal text in the package; where a value goes in, a line ends."""
    pieces = []
    for path in (ROOT / "rae_xla").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
    return "\n".join(pieces)


def test_quoted_messages_exist():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    quoted = [text for row in rows for text in re.findall(r'"([^"]+)"', row.split(" | ")[0])]
    text = said()
    assert len(quoted) > 15
    assert [message for message in quoted if message not in text] == []
