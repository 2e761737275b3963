"""Class names: the formats of a ``--classes`` file, and its errors."""

import json

import pytest

from rae_xla.data.class_names import MAX_CLASSES, names_for, read_class_names
from rae_xla.errors import UserError


@pytest.mark.parametrize(
    "text",
    [
        '{"tench": 0, "white shark": 2, "goldfish": 1}',
        '["tench", "goldfish", "white shark"]',
        "tench\ngoldfish\n\nwhite shark\n",
        "goldfish 1\nwhite shark 2\r\n  tench\t0\n",
    ],
)
def test_every_format(tmp_path, text):
    (tmp_path / "classes").write_text(text)
    assert read_class_names(str(tmp_path / "classes")) == ("tench", "goldfish", "white shark")


def test_names_that_are_numbers(tmp_path):
    (tmp_path / "classes").write_text("1\n0\n")
    assert read_class_names(str(tmp_path / "classes")) == ("1", "0")
    (tmp_path / "classes").write_text(json.dumps(["boeing 747", "boeing 737"]))
    assert read_class_names(str(tmp_path / "classes")) == ("boeing 747", "boeing 737")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the list of classes is empty"),
        ('{"a": 0, ', "not readable as JSON"),
        ('{"a": "0"}', "'a': '0' is not a class name with its label"),
        ('["a", 3]', "3: 1 is not a class name"),
        ('{"a": 0, "b": 2}', "must have the labels 0 to 1; missing: 1; out of range: 2"),
        ("a 1\nb 2", "missing: 0; out of range: 2"),
        ('{"a": 0, "b": 0}', "label 0 appears twice"),
        ('{"a": 0, "a": 1}', "class a appears twice"),
        ("a 0\nb", r"some lines end with a label and some do not \('b'\)"),
    ],
)
def test_invalid_lists(tmp_path, text, message):
    (tmp_path / "classes").write_text(text)
    with pytest.raises(UserError, match=message):
        read_class_names(str(tmp_path / "classes"))


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "classes").write_bytes(b"\xff\xfe\x00")
    for name in ("classes", "nowhere", ""):
        with pytest.raises(UserError, match="no such text file"):
            read_class_names(str(tmp_path / name))


def test_names_for_labels():
    assert names_for(2, None, "x") == ("0", "1", "2")
    assert names_for(1, ("a", "b", "c"), "x") == ("a", "b", "c")
    with pytest.raises(UserError, match="x: a label is 1000000000000"):
        names_for(10**12, None, "x")
    with pytest.raises(UserError, match="x: a label is"):
        names_for(MAX_CLASSES, None, "x")
