"""Fixtures of all tests.

Tests run torch with one thread, so that results and timings do not depend on the machine, and start
with the same random seed.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gcs_emulator import GcsEmulator
from numbered import numbered_arrays
from PIL import Image

from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards

torch.set_num_threads(1)

# A shell that runs the tests in the background makes them and their processes ignore Ctrl-C.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup() -> None:
    """Seed torch before any fixture, because its initial seed differs in each process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsEmulator]:
    """Start a storage server for this worker, to which ``gs://`` paths refer while it runs."""
    with GcsEmulator() as emulator, pytest.MonkeyPatch.context() as environment:
        emulator.create_bucket("shards")
        for name, value in emulator.environment().items():
            environment.setenv(name, value)
        yield emulator


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., ShardIndex]:
    def make(count: int = 100, name: str = "shards", per_shard: int = 30) -> ShardIndex:
        source = array_source(*numbered_arrays(count), shuffle=False)
        return write_shards(
            source, str(tmp_path / name), classes=source.classes, samples_per_shard=per_shard
        )

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Write classes cat, dog and emu: a nested folder, several formats, and other files."""
    rng = np.random.default_rng(3)

    def image(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    root = tmp_path / "images"
    (root / "dog" / "big" / "old").mkdir(parents=True)
    (root / "cat").mkdir()
    (root / "emu").mkdir()
    image(40, 50, 3).save(root / "dog" / "a.JPEG", quality=90)
    image(64, 48, 3).save(root / "dog" / "big" / "old" / "b.png")
    image(20, 20).save(root / "cat" / "grey.png")
    image(20, 30, 4).save(root / "cat" / "alpha.png")
    image(33, 35, 3).convert("CMYK").save(root / "emu" / "print.jpg")
    image(30, 30, 3).save(root / "emu" / "map.bmp")
    (root / "emu" / "notes.txt").write_text("not an image")
    (root / "emu" / ".hidden.png").write_bytes(b"nor this")
    (root / "README.md").write_text("not a class")
    return root


@pytest.fixture
def bucket(gcs: GcsEmulator) -> Iterator[str]:
    """Yield a new folder in the bucket; remove it, faults and delays afterwards."""
    folder = uuid.uuid4().hex
    yield f"gs://shards/{folder}"
    gcs.reset()
    gcs.remove("shards", f"{folder}/")


@pytest.fixture(scope="session")
def storage_server(gcs: GcsEmulator) -> GcsEmulator:
    """Return the storage server, with a bucket for runs."""
    gcs.create_bucket("runs")
    return gcs


@pytest.fixture
def run_folder(storage_server: GcsEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield a new folder in the bucket of runs; remove it and faults afterwards."""
    monkeypatch.setenv("RAE_XLA_GCS_TIMEOUT", "1")
    folder = uuid.uuid4().hex
    yield f"gs://runs/{folder}"
    storage_server.reset()
    storage_server.remove("runs", f"{folder}/")
