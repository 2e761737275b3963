"""Names that moved still import, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import rae_xla
from rae_xla.moved import moved_names

PAGE = Path(__file__).parents[1] / "docs" / "python_api.md"
_SECTION = re.search(r"^## Names that moved\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
NAMES = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", _SECTION[1], re.M)


def get(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_an_old_name(old, new):
    with pytest.warns(FutureWarning, match=f"{re.escape(old)} is deprecated.*use {re.escape(new)}"):
        found = get(old)
    assert found is get(new)


def test_the_page_lists_every_old_name():
    package = Path(rae_xla.__file__).parent
    names = set()
    for path in package.rglob("*.py"):
        if "= moved_names(" in path.read_text():
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = importlib.import_module(".".join(p for p in parts if p != "__init__"))
            old = inspect.getclosurevars(module.__getattr__).nonlocals["names"]
            names |= {f"{module.__name__}.{name}" for name in old}
    assert sorted(names) == sorted(old for old, _ in NAMES)


def test_another_name_is_an_attribute_error():
    find = moved_names("a.b", {"old": "json.dumps"})
    with pytest.raises(AttributeError, match=r"module 'a.b' has no attribute 'new'"):
        find("new")
