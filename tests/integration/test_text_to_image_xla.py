"""Text-to-image training on XLA and on several processes: the same numbers as on one CPU.

Each run is a separate process, as a user would start it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import metrics, rae_xla, rae_xla_processes
from tiny_captions import make_config, make_mixture

pytestmark = pytest.mark.xla

TOPOLOGIES = {
    "1 device": ["runtime.devices=1"],
    "4 fsdp": ["runtime.devices=4", "runtime.remat=1.0", "runtime.scan=true"],
    "2 data x 2 fsdp": ["runtime.devices=4", "mesh.ici.data=2"],
}
STEPS = 10
COMPARED = ("train/loss", "train/text_loss", "train/image_loss", "train/grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2i")
    make_config(folder, "set below")
    # Rows with one image, two and none; generated, described and asked about.
    settings = ["text_to_image.times_per_image=2", f"training.steps={STEPS}"]
    (folder / "mixed.json").write_text(json.dumps(make_mixture(folder) + settings))
    return folder


def arguments(folder: Path, name: str, overrides: list[str]) -> list[object]:
    mixed = json.loads((folder / "mixed.json").read_text())
    results = ["--results-dir", folder / name, *mixed, *overrides]
    return ["train", "t2i", "--config", folder / "t2i.yaml", *results]


def train(folder: Path, name: str, overrides: list[str]) -> dict[int, dict[str, Any]]:
    done = rae_xla(*arguments(folder, name, overrides))
    assert done.returncode == 0, done.stderr
    assert "is traced at each call" not in done.stderr  # every step is replayed
    return metrics(folder / name)


@pytest.fixture(scope="module")
def on_torch(folder: Path) -> Any:
    return train(folder, "torch", [])


def losses(found: Any) -> dict[str, list[float]]:
    rows = found.values() if isinstance(found, dict) else found
    return {name: [row[name] for row in rows if name in row] for name in COMPARED}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "4 fsdp" else pytest.mark.nightly)
        for name in TOPOLOGIES
    ],
)
def test_every_topology_gives_the_same_numbers(folder: Path, on_torch: Any, name: str) -> None:
    found = train(folder, name.replace(" ", "_"), ["runtime.backend=xla", *TOPOLOGIES[name]])
    expected, actual = losses(on_torch), losses(found)
    assert len(expected["train/loss"]) == STEPS
    for metric in COMPARED:
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-4), metric
    rows = list(found.values() if isinstance(found, dict) else found)
    last = next(row for row in reversed(rows) if "perf/compilations" in row)
    assert last["perf/compilations"] == 1
    assert last["perf/fallbacks"] == 0  # tensors that were read on the host are counted, too


def test_two_processes_of_torch_give_the_same_numbers(folder: Path, on_torch: Any) -> None:
    for done in rae_xla_processes(2, *arguments(folder, "fsdp2", ["mesh.ici.fsdp=2"])):
        assert done.returncode == 0, done.stderr
    expected, actual = losses(on_torch), losses(metrics(folder / "fsdp2"))
    for metric in COMPARED:
        assert actual[metric] == pytest.approx(expected[metric], rel=1e-4), metric


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["mesh.ici.fsdp=2"]),
        pytest.param(1, ["runtime.backend=xla", "runtime.devices=4"], marks=pytest.mark.nightly),
    ],
    ids=["two processes of torch", "xla, 4 devices"],
)
def test_previews_show_the_images_of_one_device(
    folder: Path, processes: int, settings: list[str]
) -> None:
    short = ["training.steps=1", "training.sample_every=1"]
    train(folder, "preview", short)
    name = f"preview {settings[0]}"
    for done in rae_xla_processes(processes, *arguments(folder, name, [*short, *settings])):
        assert done.returncode == 0, done.stderr
    for step in (0, 1):
        expected, found = (
            np.asarray(Image.open(folder / run / f"samples/t2i-{step:08d}.png")).astype(int)
            for run in ("preview", name)
        )
        assert expected.std() > 10
        assert np.abs(found - expected).max() <= 1
