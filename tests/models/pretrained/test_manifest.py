"""Fingerprints of weights, and the manifest files that record them."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import save_file

from rae_xla.errors import UserError
from rae_xla.models.pretrained.fingerprint import (
    DIT,
    ENCODER,
    STATISTICS,
    fingerprint,
    of_statistics,
)
from rae_xla.models.pretrained.latent_statistics import (
    EPS,
    read_latent_statistics,
    standard_deviation,
)
from rae_xla.models.pretrained.manifest import (
    Part,
    check_parts,
    manifest_path,
    parse_manifest,
    read_weights_manifest,
)
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


def test_the_fingerprint_of_statistics_does_not_depend_on_the_processor() -> None:
    """torch's float32 square root does; NumPy's is correctly rounded, as IEEE 754 requires."""
    mean, var = read_latent_statistics(str(GOLDEN / "rae/dinov2/stat.pt"))
    std = torch.from_numpy(np.sqrt((var + EPS).numpy()))
    assert torch.equal(standard_deviation(var), std)
    assert of_statistics(mean, std).startswith("2a839de254c5")


def test_statistics_of_format_1_are_not_compared() -> None:
    """Their fingerprints depended on the processor; those of other parts are compared."""
    parts = {kind: {"sha256": "0" * 64, "name": "old"} for kind in (STATISTICS, ENCODER)}
    manifest = parse_manifest({"format": 1, "parts": {}, "made_with": {DIT: parts}}, "old.json")
    check_parts(manifest, {STATISTICS: Part("1" * 64, "new")}, "old")
    with pytest.raises(UserError, match="encoder"):
        check_parts(manifest, {STATISTICS: Part("1" * 64), ENCODER: Part("1" * 64, "new")}, "old")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": 1, "parts": {"a": 3}}'])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, content: str) -> None:
    weights = tmp_path / "decoder.pt"
    manifest_path(weights).write_text(content)
    with pytest.raises(UserError, match=r"decoder\.pt\.manifest\.json"):
        read_weights_manifest(weights)


def test_a_manifest_of_a_later_version_is_an_error(tmp_path: Path) -> None:
    manifest_path(tmp_path / "d.pt").write_text(json.dumps({"format": 3}))
    with pytest.raises(UserError, match="has format 3"):
        read_weights_manifest(tmp_path / "d.pt")
