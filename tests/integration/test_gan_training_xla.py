"""The GAN step on XLA, on digits: the numbers of plain torch, a compilation a phase, kills in each.

VGG and DINO are random networks (the first of the real shape): this is about arithmetic.
"""

import math
import os
import re
from itertools import pairwise

import pytest
from tiny import (
    IMAGES,
    PHASES,
    SMOOTH,
    make_gan_config,
    metrics,
    rae_xla,
    same_bits,
    saved,
    train_and_kill,
)

from rae_xla.data.shards import write_shards
from rae_xla.data.sources import array_source

pytestmark = pytest.mark.xla

FOUR = ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Real digits, the quickstart's, but only some."""
    pytest.importorskip("sklearn")
    import digits

    folder = tmp_path_factory.mktemp("world")
    digits.write(folder / "images")
    images, labels = digits.read(folder / "images/train")
    chosen = slice(None, None, len(images) // IMAGES)
    source = array_source(images[chosen][:IMAGES], labels[chosen][:IMAGES])
    write_shards(source, str(folder / "shards"), samples_per_shard=20)
    return {"folder": folder, "config": make_gan_config(folder, str(folder / "shards"))}


def train(world, name, *overrides):
    folder = world["folder"] / name
    done = rae_xla(
        "train", "stage1", "--config", world["config"], "--results-dir", folder, *overrides,
        timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return metrics(folder)


LOSSES = ("train/loss", "train/l1", "train/lpips", "train/gan", "train/disc/loss")


@pytest.fixture(scope="module")
def on_torch(world):
    return train(world, "torch", *SMOOTH)


def gathered(folder):
    """Sizes of what the partitioned step gathers, and its collectives that move activations."""
    files = folder.glob("*cpu_after_optimizations.txt")
    step = max(files, key=lambda path: path.stat().st_size).read_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\][^ ]* all-gather\(", step)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in shapes]
    return sizes, len(re.findall(r" (?:all-to-all|collective-permute)\(", step))


def test_only_weights_are_gathered(world, monkeypatch):
    """Activations stay on the devices whose rows they are, through all five networks. (The rows
    of 8 images are fewer than the features of the widest layers, and there rows travel by design.)
    """
    dump = world["folder"] / "hlo"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text"
    monkeypatch.setenv("XLA_FLAGS", flags)
    train(world, "dumped", *SMOOTH, *FOUR, "training.steps=1", "training.global_batch_size=16")
    sizes, moved = gathered(dump)
    assert moved == 0
    content = saved(world["folder"] / "dumped", step=1)
    weights = {tensor.numel() for part in ("model", "disc") for tensor in content[part].values()}
    assert sizes
    # a few numbers of each image (a mean, a norm) may travel
    assert [size for size in sizes if size > 8 * 64 and size not in weights] == []


@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), 4], ids=["1 device", "4 fsdp"]
)
def test_every_topology_gives_the_losses_of_plain_torch(world, on_torch, devices):
    backend = ["runtime.backend=xla", f"runtime.devices={devices}"]
    lines = train(world, f"{devices}-devices", *SMOOTH, *backend)
    for one, other in zip(lines, on_torch, strict=True):
        for name in LOSSES:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
        # The gradient of the whole batch on every device, not of a device's share. Measured: it
        # differs by 1e-5 in the first step, by 4e-4 in the second, by 3e-3 in the third, and by up
        # to 7e-3 once the rectifiers have taken sides.
        tolerance = {1: 1e-4, 2: 1e-3, 3: 1e-2}.get(one["step"], 3e-2)
        for name in ("train/disc/grad_norm", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=tolerance), (one["step"], name)
    assert {line["perf/compilations"] for line in lines} == {1}
    assert {line["perf/fallbacks"] for line in lines} == {0}


@pytest.mark.slow
def test_three_phases_three_compilations_and_a_kill(world):
    """Killed in the second phase; in every one: test_gan_training.py, without the compilations."""
    lines = train(world, "whole", *FOUR)
    begins = [*PHASES, 20]
    for number, (first, last) in enumerate(pairwise(begins), 1):
        of_phase = [line["perf/compilations"] for line in lines[first:last]]
        assert of_phase == [number] * len(of_phase)
    assert {line["perf/fallbacks"] for line in lines} == {0}

    folder = world["folder"] / "killed"
    train_and_kill("stage1", world["config"], folder, *FOUR, step=8, pictures=False)
    train(world, "killed", *FOUR)
    same_bits(world["folder"] / "whole", folder)
