"""The GAN step on XLA, on digits: results of plain torch, one compilation per phase, exact resume.

VGG and DINO are random networks (the first of the real shape): the tests are about arithmetic. Each
phase compiles for a minute with VGG, so the default level has the last phase alone, without LPIPS.
"""

import math
import os
import re
import shutil
from itertools import pairwise

import pytest
from tiny import (
    IMAGES,
    SMOOTH,
    make_gan_config,
    metrics,
    rae_xla,
    same_bits,
    saved,
    train_and_kill,
)

from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards

pytestmark = pytest.mark.xla

FOUR = ["runtime.backend=xla", "runtime.devices=4", "mesh.ici.fsdp=4"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A subset of the real digits of the quickstart."""
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
    assert "is traced at each call" not in done.stderr  # every step is replayed
    return metrics(folder)


LOSSES = ("train/loss", "train/l1", "train/lpips", "train/gan", "train/disc/loss")
GRADIENTS = ("train/disc/grad_norm", "train/grad_norm")

# Enough rows that test_only_weights_are_gathered can tell weights from activations: those of 8
# images are fewer than the features of the widest layers, and there rows travel by design.
ROWS = "training.global_batch_size=16"

# One run with every phase: 48 images are 3 steps per epoch.
BEGINS = (0, 3, 6)
STEPS = 8
ALL_PHASES = [
    *SMOOTH, ROWS, "gan.loss.disc_upd_start=1", "gan.loss.disc_start=2", f"training.steps={STEPS}",
    "checkpoint.every_steps=2",
]  # fmt: skip


# The first step at which each phase begins, and the settings of a run.
LAST_PHASE = ((0,), [*SMOOTH, ROWS, "gan.loss.perceptual_weight=0", "training.steps=4"])
RUNS = [
    pytest.param(LAST_PHASE, id="last phase"),
    pytest.param((BEGINS, ALL_PHASES), id="all phases", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module", params=RUNS)
def run(request):
    """The first steps of the phases, and the settings."""
    return request.param


@pytest.fixture(scope="module")
def on_torch(world, run):
    return train(world, f"torch-{len(run[0])}", *run[1])


@pytest.fixture(scope="module")
def on_four_devices(world, run):
    """Metrics of a run whose compiled programs are in the folder ``hlo``."""
    shutil.rmtree(world["folder"] / "hlo", ignore_errors=True)
    dump = f"--xla_dump_to={world['folder'] / 'hlo'} --xla_dump_hlo_as_text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {dump}")
        return train(world, f"4-devices-{len(run[0])}", *run[1], *FOUR)


def gathered(folder):
    """Return the sizes of all-gathers, and the number of collectives that move activations."""
    files = folder.glob("*cpu_after_optimizations.txt")
    step = max(files, key=lambda path: path.stat().st_size).read_text()  # of the last phase
    shapes = re.findall(r"= \w+\[([\d,]*)\][^ ]* all-gather\(", step)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in shapes]
    return sizes, len(re.findall(r" (?:all-to-all|collective-permute)\(", step))


def test_only_weights_are_gathered(world, run, on_four_devices):
    """Activations stay on the devices that hold their rows, in all networks."""
    sizes, moved = gathered(world["folder"] / "hlo")
    assert moved == 0
    folder = world["folder"] / f"4-devices-{len(run[0])}"
    content = saved(folder, step=len(on_four_devices))
    weights = {tensor.numel() for part in ("model", "disc") for tensor in content[part].values()}
    assert sizes
    # a few numbers per image (a mean, a norm) may be gathered
    assert [size for size in sizes if size > 8 * 64 and size not in weights] == []


def test_four_devices_give_the_losses_of_plain_torch(on_torch, on_four_devices):
    same_metrics(on_four_devices, on_torch)


# The gradient of the global batch on every device, not of its local rows. Measured: it differs by
# 1e-5 in the first step, by 4e-4 in the second, by 3e-3 in the third, and by up to 7e-3 once the
# rectifiers have taken sides.
TOLERANCES = {1: 1e-4, 2: 1e-3, 3: 1e-2}


def same_metrics(lines, on_torch, tolerances=TOLERANCES):
    for one, other in zip(lines, on_torch, strict=True):
        assert one.keys() & {*LOSSES, *GRADIENTS} == other.keys() & {*LOSSES, *GRADIENTS}
        for name in one.keys() & set(LOSSES):
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
        tolerance = tolerances.get(one["step"], 3e-2)
        for name in one.keys() & set(GRADIENTS):
            assert one[name] == pytest.approx(other[name], rel=tolerance), (one["step"], name)


def test_each_phase_compiles_once(run, on_four_devices):
    for number, (first, last) in enumerate(pairwise((*run[0], len(on_four_devices))), 1):
        of_phase = [line["perf/compilations"] for line in on_four_devices[first:last]]
        assert of_phase == [number] * len(of_phase)
    assert {line["perf/fallbacks"] for line in on_four_devices} == {0}


@pytest.mark.nightly
@pytest.mark.parametrize("run", RUNS[1:], indirect=True)
def test_resumed_in_the_last_phase_a_run_ends_with_the_same_bits(world, on_four_devices):
    complete, folder = (world["folder"] / name for name in ("4-devices-3", "resumed"))
    shutil.copytree(complete, folder)
    shutil.rmtree(folder / f"checkpoints/step-{STEPS:08d}")
    train(world, "resumed", *ALL_PHASES, *FOUR)
    same_bits(complete, folder, STEPS)


@pytest.mark.nightly
@pytest.mark.parametrize("devices", [1, 4])
def test_all_losses_from_the_first_step_give_the_numbers_of_plain_torch(world, devices):
    """Before differences of rounding have grown, the tolerances of all gradients are tight.

    The gradient of LPIPS jumps where a rectifier changes sides. On plain torch, noise of 3e-6 on
    the decoded pixels, as much as two compilers differ by, changes its norm by 3e-5 (this seed) to
    1e-3 (others) in the first step, and by up to 1e-3 in the second.
    """
    settings = [*SMOOTH, "training.global_seed=5"]
    if not (world["folder"] / "torch-all").exists():
        train(world, "torch-all", *settings)
    backend = ["runtime.backend=xla", f"runtime.devices={devices}"]
    lines = train(world, f"all-on-{devices}", *settings, *backend)
    same_metrics(lines, metrics(world["folder"] / "torch-all"), TOLERANCES | {2: 3e-3})
    assert {line["perf/compilations"] for line in lines} == {1}


@pytest.mark.nightly
@pytest.mark.parametrize("run", RUNS[1:], indirect=True)
def test_killed_in_the_second_phase_a_run_ends_with_the_same_bits(world, on_four_devices):
    """In every phase: test_gan_training.py, without the compilations."""
    folder = world["folder"] / "killed"
    settings = [*ALL_PHASES, *FOUR]
    train_and_kill("stage1", world["config"], folder, *settings, step=4, sample_images=False)
    train(world, "killed", *settings)
    same_bits(world["folder"] / "4-devices-3", folder, STEPS)
