"""Ranges: every numeric key has one, and a value outside of it is an error that names all three."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from schema_keys import ALL_KEYS, SCHEMAS, leaf_types, rules

from rae_xla.config import load_config
from rae_xla.config.paths import PathRule
from rae_xla.config.ranges import LARGEST_INTEGER, Range
from rae_xla.config.typed import key_types
from rae_xla.errors import UserError


@pytest.mark.parametrize("key", [k for k, h in ALL_KEYS.items() if leaf_types(h) & {int, float}])
def test_every_numeric_key_has_a_range(key):
    assert len(rules(ALL_KEYS[key], Range)) == 1


@pytest.mark.parametrize(
    "key",
    [
        key
        for key, hint in ALL_KEYS.items()
        if leaf_types(hint) & {str}
        and key.rsplit(".", 1)[-1].endswith(("path", "dir", "ckpt", "cache", "stat", "sharding"))
    ],
)
def test_every_path_has_a_rule(key):
    assert len(rules(ALL_KEYS[key], PathRule)) == 1


@pytest.mark.parametrize("prefix", SCHEMAS)
def test_defaults_are_in_range(prefix):
    def check(section: Any) -> None:
        hints = key_types(type(section))
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if dataclasses.is_dataclass(value):
                check(value)
            for accepted in rules(hints.get(field.name), Range):
                for number in value if isinstance(value, tuple) else (value,):
                    assert number is None or accepted.contains(number), field.name

    check(SCHEMAS[prefix]())


@pytest.mark.parametrize(
    ("accepted", "inside", "outside", "words", "symbols"),
    [
        (Range(), (-1e300, 0), (), "a finite number", "finite"),
        (Range(above=0), (1e-300, 1e300), (0, -1), "a number above 0", "> 0"),
        (
            Range(least=0, below=1),
            (0, 0.999),
            (-1e-9, 1),
            "a number of at least 0 and below 1",
            ">= 0, < 1",
        ),
        (
            Range(least=1, most=LARGEST_INTEGER, also=-1),
            (1, -1, LARGEST_INTEGER),
            (0, -2),
            "a number of at least 1, or -1",
            ">= 1; or -1",
        ),
        (
            Range(least=1, most=9, odd=True),
            (1, 9),
            (0, 2, 11),
            "an odd number of at least 1 and at most 9",
            ">= 1, <= 9, odd",
        ),
    ],
)
def test_ranges(accepted, inside, outside, words, symbols):
    assert all(map(accepted.contains, inside))
    assert not any(map(accepted.contains, (*outside, float("nan"), float("inf"), float("-inf"))))
    assert accepted.describe() == words
    assert accepted.symbols() == symbols


def test_the_shared_bound_is_named_where_it_excludes():
    with pytest.raises(UserError, match=r"at least 1 and at most 2147483647, got 2147483648"):
        load_config(None, ["training.steps=2147483648"])


def test_a_number_of_a_list_is_named():
    with pytest.raises(
        UserError, match=r"^training\.optimizer\.betas .*got 1\.5 in \[0\.9, 1\.5\]"
    ):
        load_config(None, ["training.optimizer.betas=[0.9,1.5]"])


@pytest.mark.parametrize("value", ["-1", "-0.5", "0", "0.0"])
def test_clipping_is_off_at_and_below_zero(value):
    assert load_config(None, [f"training.clip_grad={value}"]).training.clip_grad == 0
