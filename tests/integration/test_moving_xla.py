"""A run that moves from one topology to the next, and to plain torch, stays the same run."""

import pytest
import torch
from tiny import make_configs, make_shards, metrics, rae_xla, saved

from rae_xla.interop.checkpoint_folder import Checkpoint
from rae_xla.interop.checkpoint_tensors import stored_parts

pytestmark = pytest.mark.xla

PLACES = [
    (5, ["runtime.backend=xla", "runtime.devices=8", "mesh.ici.fsdp=8"]),
    (10, ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"]),
    (15, ["runtime.backend=xla", "runtime.devices=8", "mesh.ici.data=2", "mesh.ici.fsdp=4"]),
    (20, ["runtime.backend=torch"]),
]
"""Up to which step, and where."""


@pytest.mark.slow
def test_8_to_4_to_2x4_devices_and_to_torch(tmp_path):
    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]

    def train(name, *overrides):
        command = ("train", "stage2", "--config", config, "--results-dir", tmp_path / name)
        done = rae_xla(*command, *overrides)
        assert done.returncode == 0, done.stderr

    train("still")
    for steps, place in PLACES:
        train("moving", f"training.steps={steps}", *place)
    for one, other in zip(metrics(tmp_path / "moving"), metrics(tmp_path / "still"), strict=True):
        assert one["step"] == other["step"]
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), one["step"]
    moved, still = saved(tmp_path / "moving"), saved(tmp_path / "still")
    for name, tensor in still["ema"].items():
        torch.testing.assert_close(moved["ema"][name], tensor, rtol=1e-3, atol=1e-5)


def test_of_each_tensor_every_element_is_written_once(tmp_path):
    """On 2 x 2 devices: split over two, held twice, or whole on all four."""
    from rae_xla.runtime.checkpoint_reader import read_table

    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]
    done = rae_xla(
        "train", "stage2", "--config", config, "--results-dir", tmp_path / "run",
        "training.steps=1", "runtime.backend=xla", "runtime.devices=4", "mesh.ici.data=2",
        "mesh.ici.fsdp=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = Checkpoint(str(tmp_path / "run/checkpoints/step-00000001"))
    table = read_table(checkpoint.folder).state_dict_metadata
    chunks = {name: len(entry.chunks) for name, entry in table.items()}
    assert set(chunks.values()) == {1, 2}
    assert sum(count == 2 for count in chunks.values()) > 20
    weights = sum(t.numel() for t in stored_parts(checkpoint)["model"].values())
    size = (tmp_path / "run/checkpoints/step-00000001/model-0.distcp").stat().st_size
    assert 4 * weights < size < 4 * weights + 2000 * len(chunks)
