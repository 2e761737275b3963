"""RAEv2's options on XLA: one compilation, no fallback, the losses of plain torch; resume."""

import pytest
import raev2_tiny
from tiny import make_configs, make_shards, metrics, rae_xla, same_bits, train_and_kill

pytestmark = [pytest.mark.xla, pytest.mark.slow]

OPTIONS = [
    *raev2_tiny.TRANSFORMER, *raev2_tiny.MUON, *raev2_tiny.POSTHOC, "training.steps=10",
]  # fmt: skip
XLA = ["runtime.backend=xla", "checkpoint.every_steps=5"]
TOPOLOGIES = {
    "1 device": ["runtime.devices=1"],
    "4 fsdp": ["runtime.devices=4"],
    "4 fsdp, scan": ["runtime.devices=4", "runtime.scan=true"],
    "2 data x 2 fsdp": ["runtime.devices=4", "mesh.ici.data=2"],
    "2 fsdp x 2 tensor": ["runtime.devices=4", "mesh.ici.tensor=2"],
}
# Each takes minutes to compile; "4 fsdp" exchanges the matrices.
TOPOLOGY_PARAMETERS = [
    pytest.param(name, marks=[] if name == "4 fsdp" else pytest.mark.nightly) for name in TOPOLOGIES
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder} | make_configs(folder, make_shards(folder))


def train(world, name, *overrides):
    folder = world["folder"] / name
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", folder,
        *OPTIONS, *overrides,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is traced at each call" not in done.stderr  # every step is replayed
    return metrics(folder)


@pytest.fixture(scope="module")
def on_torch(world):
    return train(world, "torch")


@pytest.mark.parametrize("topology", TOPOLOGY_PARAMETERS)
def test_every_topology_has_the_losses_of_plain_torch(world, on_torch, topology):
    lines = train(world, topology, *XLA, *TOPOLOGIES[topology])
    for one, other in zip(lines, on_torch, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), one["step"]
    assert {line["perf/compilations"] for line in lines} == {1}
    assert {line["perf/fallbacks"] for line in lines} == {0}


@pytest.mark.nightly
def test_killed_run_ends_with_the_same_bits(world):
    train(world, "whole", *XLA, *TOPOLOGIES["4 fsdp"])
    folder = world["folder"] / "killed"
    options = [*OPTIONS, *XLA, *TOPOLOGIES["4 fsdp"]]
    train_and_kill("stage2", world["stage2"], folder, *options, step=5, sample_images=False)
    train(world, "killed", *XLA, *TOPOLOGIES["4 fsdp"])
    same_bits(folder, world["folder"] / "whole", step=10)
