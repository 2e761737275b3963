"""A bucket to save to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from gcs_emulator import GcsEmulator


@pytest.fixture(scope="session")
def storage_server(gcs: GcsEmulator) -> GcsEmulator:
    """The storage server, with a bucket for runs."""
    gcs.create_bucket("runs")
    return gcs


@pytest.fixture
def run_folder(storage_server: GcsEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh folder in the bucket; afterwards neither it nor any fault is left."""
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "1")
    folder = uuid.uuid4().hex
    yield f"gs://runs/{folder}"
    storage_server.reset()
    storage_server.remove("runs", f"{folder}/")
