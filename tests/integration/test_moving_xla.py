"""A run that resumes on other topologies, and on the torch backend, computes the same numbers."""

import pytest
import torch
from tiny import make_configs, make_shards, metrics, rae_xla, saved

from rae_xla.checkpoint.manager import Checkpoint
from rae_xla.checkpoint.reader import read_metadata
from rae_xla.checkpoint.tensors import stored_parts

pytestmark = pytest.mark.xla

ON_8 = (5, ["runtime.backend=xla", "runtime.devices=8", "mesh.ici.fsdp=8"])
ON_4 = (10, ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"])
ON_2X4 = (15, ["runtime.backend=xla", "runtime.devices=8", "mesh.ici.data=2", "mesh.ici.fsdp=4"])
ON_2X2 = (15, ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.data=2", "mesh.ici.fsdp=2"])
ON_TORCH = (20, ["runtime.backend=torch"])
"""(last step, settings of the place) of a stretch of the run."""

PLACES = [
    pytest.param([ON_4, ON_2X2, ON_TORCH], id="4 to 2x2 devices, then torch"),
    pytest.param(
        [ON_8, ON_4, ON_2X4, ON_TORCH],
        id="8 to 4 to 2x4 devices, then torch",
        marks=pytest.mark.nightly,
    ),
]


@pytest.mark.parametrize("places", PLACES)
def test_a_run_moves_between_topologies_and_to_torch(tmp_path, places):
    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]

    def train(name, *overrides):
        command = ("train", "stage2", "--config", config, "--results-dir", tmp_path / name)
        done = rae_xla(*command, *overrides)
        assert done.returncode == 0, done.stderr

    train("unmoved")
    for steps, place in places:
        train("moving", f"training.steps={steps}", *place)
    for one, other in zip(metrics(tmp_path / "moving"), metrics(tmp_path / "unmoved"), strict=True):
        assert one["step"] == other["step"]
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), one["step"]
    moved, unmoved = saved(tmp_path / "moving"), saved(tmp_path / "unmoved")
    for name, tensor in unmoved["ema"].items():
        torch.testing.assert_close(moved["ema"][name], tensor, rtol=1e-3, atol=1e-5)


def test_every_element_of_a_tensor_is_written_once(tmp_path):
    """On 2 x 2 devices, where tensors are sharded over two devices or replicated on all four."""
    config = make_configs(tmp_path, make_shards(tmp_path))["stage2"]
    done = rae_xla(
        "train", "stage2", "--config", config, "--results-dir", tmp_path / "run",
        "training.steps=1", "runtime.backend=xla", "runtime.devices=4", "mesh.ici.data=2",
        "mesh.ici.fsdp=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = Checkpoint(str(tmp_path / "run/checkpoints/step-00000001"))
    table = read_metadata(checkpoint.folder).state_dict_metadata
    chunks = {name: len(entry.chunks) for name, entry in table.items()}
    assert set(chunks.values()) == {1, 2}
    assert sum(count == 2 for count in chunks.values()) > 20
    weights = sum(t.numel() for t in stored_parts(checkpoint)["model"].values())
    size = (tmp_path / "run/checkpoints/step-00000001/model-0.distcp").stat().st_size
    assert 4 * weights < size < 4 * weights + 2000 * len(chunks)
