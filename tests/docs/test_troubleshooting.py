"""docs/troubleshooting.md quotes only messages that exist in the package."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/troubleshooting.md"


def string_literals() -> str:
    """Return all string literals of the package, one per line; f-strings are split at values."""
    pieces = []
    for path in (ROOT / "rae_xla").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(node.value)
    return "\n".join(pieces)


def test_quoted_messages_exist():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    quoted = [text for row in rows for text in re.findall(r'"([^"]+)"', row.split(" | ")[0])]
    text = string_literals()
    assert len(quoted) > 15
    assert [message for message in quoted if message not in text] == []
