"""docs/architecture.md agrees with the code."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

from rae_xla.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def without_docstring(source):
    function = ast.parse(textwrap.dedent(source)).body[0]
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    return ast.unparse(function)


def test_the_loop_on_the_page_is_the_loop():
    [block] = re.findall(r"^```python\n(def fit.*?)^```", PAGE, re.M | re.S)
    assert without_docstring(block) == without_docstring(inspect.getsource(Trainer.fit))


def test_the_path_of_a_batch_names_existing_files():
    section = PAGE.partition("## The path of a batch")[2].partition("\n## ")[0]
    files = re.findall(r"^\| `([\w/]+\.py)` \|", section, re.M)
    assert len(files) == 15
    assert [file for file in files if not (ROOT / "rae_xla" / file).is_file()] == []


def test_the_packages_on_the_page_are_the_packages():
    listed = set(re.findall(r"^  (\w+)/ ", PAGE, re.M))
    packages = {p.parent.name for p in (ROOT / "rae_xla").glob("*/__init__.py")}
    assert listed == packages
