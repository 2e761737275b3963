"""Class names: the formats of a ``--classes`` file, and its errors."""

import json

import pytest

from rae_xla.data.class_names import (
    MAX_CLASSES,
    class_names_of_run,
    find_class,
    imagenet_names,
    in_label_order,
    names_for,
    read_class_names,
    record_class_names,
    recorded_class_names,
    warn_of_numbers,
)
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


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "classes").write_bytes("cat\ndog\n".encode("utf-16"))
    for name, message in (
        ("classes", "classes: not a text file in UTF-8"),
        ("nowhere", "nowhere: no such file"),
        ("", "cannot be read .Is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            read_class_names(str(tmp_path / name))


@pytest.mark.parametrize(
    "content",
    [
        b"1 cat\n0 dog\n",  # the label first
        b"\xef\xbb\xbfdog\r\ncat\r\n",  # a byte order mark
        b'\xef\xbb\xbf{"cat": 1, "dog": 0}',
    ],
)
def test_files_of_other_programs(tmp_path, content):
    (tmp_path / "classes").write_bytes(content)
    assert read_class_names(str(tmp_path / "classes")) == ("dog", "cat")


def test_numbers_that_belong_to_names(tmp_path):
    (tmp_path / "classes").write_text("0 boeing 747\n1 boeing 737\n")
    assert read_class_names(str(tmp_path / "classes")) == ("boeing 747", "boeing 737")
    (tmp_path / "classes").write_text("7 dwarfs 0\n3 kings 1\n")
    assert read_class_names(str(tmp_path / "classes")) == ("7 dwarfs", "3 kings")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,label\ncat,0\ndog,1\n", "'class,label', is the header of a table"),
        ("name\tlabel\ncat\t0\n", "is the header of a table"),
        ("label\ncat\ndog\n", "'label', is the header of a table"),
        ("cat,0\ndog,1\n", r"\('cat,0'\) are those of a table"),
        ('0;"cat"\n1;"dog"\n', "are those of a table"),
        ("0: cat\n1: dog\n", "or a numbered list"),
        ("0 cat\ndog\n", r"some lines begin with a label and some do not \('dog'\)"),
        ("1 cat 0\n0 dog 1\n", "either could be the label"),
        ('{"0": "cat", "1": "dog"}', "has the label first"),
        ('{"0": ["n02123045", "tabby"]}', "has the label first"),
        ('{"": 0}', "not a class name"),
        ("cat " + "9" * 5000 + "\ndog 1", "some lines end with a label and some do not"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, text, message):
    (tmp_path / "classes").write_text(text)
    with pytest.raises(UserError, match=message):
        read_class_names(str(tmp_path / "classes"))


def test_names_with_commas_are_not_a_table(tmp_path):
    (tmp_path / "classes").write_text("tench, Tinca tinca\ngoldfish, Carassius auratus\n")
    assert read_class_names(str(tmp_path / "classes"))[0] == "tench, Tinca tinca"


def test_order_of_numbered_folders():
    assert in_label_order(map(str, range(12))) == [str(label) for label in range(12)]
    assert in_label_order({"10", "9", "cat"}) == ["10", "9", "cat"]
    assert in_label_order(["02", "10", "1"]) == ["1", "02", "10"]


def test_numbers_that_are_not_the_labels_are_reported(caplog):
    warn_of_numbers(["0", "1"], "x")
    warn_of_numbers(["00", "01"], "x")
    warn_of_numbers(["1", "cat"], "x")
    assert not caplog.records
    warn_of_numbers(["0", "1", "10"], "photos: class folder")
    assert "photos: class folder 10 has the label 2" in caplog.text


IMAGENET = ("tench, Tinca tinca", "great grey owl", "lady's slipper", "golden retriever", "owl")


@pytest.mark.parametrize(
    ("query", "label"),
    [
        ("tench", 0),
        ("Tinca tinca", 0),
        ("tinca", 0),
        ("tench, tinca tinca", 0),
        ("golden_retriever", 3),
        ("Golden-Retriever!", 3),
        ("ladys slipper", 2),
        ("owl", 4),
        ("grey owl", 1),
    ],
)
def test_names_are_found_by_synonyms_and_without_punctuation(query, label):
    assert find_class(query, IMAGENET) == label


def test_names_that_are_not_found():
    for query in ("trench", "!", ""):
        with pytest.raises(UserError, match="there is no class"):
            find_class(query, IMAGENET)
    with pytest.raises(UserError, match=r"several classes are called 'crane'.*\(0\).*\(1\)"):
        find_class("crane", ("crane, bird", "crane, machine"))


def test_recorded_names(tmp_path):
    assert recorded_class_names(tmp_path) is None
    record_class_names(tmp_path, [str(label) for label in range(1000)])  # ImageNet's labels
    assert recorded_class_names(tmp_path) is None
    record_class_names(tmp_path, ("0", "1"))  # of folders, say
    assert recorded_class_names(tmp_path) == ("0", "1")
    record_class_names(tmp_path, ("cat", "dog"))
    assert recorded_class_names(str(tmp_path)) == ("cat", "dog")
    (tmp_path / "classes.json").write_text('{"cat": 0}')
    with pytest.raises(UserError, match=r"classes\.json: not a JSON array"):
        recorded_class_names(tmp_path)
    (tmp_path / "classes.json").write_text("[")
    with pytest.raises(UserError, match=r"classes\.json: cannot be read"):
        recorded_class_names(tmp_path)


def test_the_names_of_a_checkpoint_are_those_of_its_run(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    record_class_names(run, ("cat", "dog"))
    assert class_names_of_run(str(run / "checkpoints" / "step-00000010")) is None  # not a run
    (run / "config.yaml").touch()
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-00000010", run / "a.pt"):
        assert class_names_of_run(str(path)) == ("cat", "dog")
    assert class_names_of_run(str(tmp_path / "other" / "a.pt")) is None


def test_names_for_labels():
    assert names_for(2, None, "x") == ("0", "1", "2")
    assert names_for(1, ("a", "b", "c"), "x") == ("a", "b", "c")
    with pytest.raises(UserError, match="x: a label is 1000000000000"):
        names_for(10**12, None, "x")
    with pytest.raises(UserError, match="x: a label is"):
        names_for(MAX_CLASSES, None, "x")


def test_imagenet_names_are_those_of_torchvision():
    from torchvision.models import ResNet50_Weights

    assert list(imagenet_names()) == ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
