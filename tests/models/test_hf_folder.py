"""Hugging Face model folders: hub ids and local paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_xla.models.hf_folder import is_hub_id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facebook/dinov2-with-registers-base", True),
        ("./facebook/model", False),
        ("/models/encoder", False),
        ("~/encoder", False),
        ("models/encoders/dino", False),
        ("encoder", False),
        ("here/encoder", False),
    ],
)
def test_is_hub_id(tmp_path: Path, monkeypatch, name, expected) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(name) is expected
