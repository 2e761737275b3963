"""Fingerprints of weights, and the manifest files that record them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import save_file

from rae_xla.errors import UserError
from rae_xla.models.pretrained.fingerprint import fingerprint
from rae_xla.models.pretrained.manifest import manifest_path, read_weights_manifest
from rae_xla.models.weights import read_weight_file


def test_the_fingerprint_does_not_depend_on_the_file(tmp_path: Path) -> None:
    state = torch.load(GOLDEN / "rae/dinov2/decoder.pt", weights_only=True)
    save_file(state, tmp_path / "decoder.safetensors")
    stored = read_weight_file(tmp_path / "decoder.safetensors", "decoder")
    turned = dict(reversed(list(state.items())))
    assert fingerprint(state) == fingerprint(stored) == fingerprint(turned)


@pytest.mark.parametrize("change", ["value", "name", "shape", "precision"])
def test_other_weights_have_another_fingerprint(change: str) -> None:
    weight = torch.randn(4, 6)
    changed = {
        "value": {"a": weight.nextafter(weight + 1)},
        "name": {"b": weight},
        "shape": {"a": weight.reshape(6, 4)},
        "precision": {"a": weight.bfloat16()},
    }
    assert fingerprint({"a": weight}) != fingerprint(changed[change])


def test_the_fingerprint_is_the_documented_one() -> None:
    """Other versions and other programs must compute the same one."""
    found = fingerprint({"b": torch.arange(3), "a": torch.tensor([[1.0, -2.0]])})
    expected = hashlib.sha256()
    for name, shape, values in (
        ("a", "(1, 2)", struct.pack("<2f", 1, -2)),
        ("b", "(3,)", struct.pack("<3q", 0, 1, 2)),
    ):
        expected.update(f"{name}\0{shape}\0".encode() + hashlib.sha256(values).digest())
    assert found == expected.hexdigest()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1, "parts": {"a": 3}}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    weights = tmp_path / "decoder.pt"
    manifest_path(weights).write_text(content)
    with pytest.raises(UserError, match=r"decoder\.pt\.manifest\.json"):
        read_weights_manifest(weights)


def test_a_manifest_of_a_later_version_is_an_error(tmp_path: Path) -> None:
    manifest_path(tmp_path / "d.pt").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="has format 2"):
        read_weights_manifest(tmp_path / "d.pt")
