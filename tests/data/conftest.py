"""Small real data sets, written to disk; and a bucket to write them to."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gcs_emulator import GcsEmulator
from numbered import numbered_arrays
from PIL import Image

from rae_xla.data.shards import ShardIndex, write_shards
from rae_xla.data.sources import array_source


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
    """Classes cat, dog and emu; a nested folder, several formats, and files that are no image."""
    rng = np.random.default_rng(3)

    def picture(*shape: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    root = tmp_path / "images"
    (root / "dog" / "big" / "old").mkdir(parents=True)
    (root / "cat").mkdir()
    (root / "emu").mkdir()
    picture(40, 50, 3).save(root / "dog" / "a.JPEG", quality=90)
    picture(64, 48, 3).save(root / "dog" / "big" / "old" / "b.png")
    picture(20, 20).save(root / "cat" / "grey.png")
    picture(20, 30, 4).save(root / "cat" / "alpha.png")
    picture(33, 35, 3).convert("CMYK").save(root / "emu" / "print.jpg")
    picture(30, 30, 3).save(root / "emu" / "map.bmp")
    (root / "emu" / "notes.txt").write_text("not an image")
    (root / "emu" / ".hidden.png").write_bytes(b"nor this")
    (root / "README.md").write_text("beside the classes")
    return root


@pytest.fixture
def bucket(gcs: GcsEmulator) -> Iterator[str]:
    """A fresh folder in the bucket; afterwards neither it nor any fault or delay is left."""
    folder = uuid.uuid4().hex
    yield f"gs://shards/{folder}"
    gcs.reset()
    gcs.remove("shards", f"{folder}/")
