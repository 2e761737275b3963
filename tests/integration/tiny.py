"""A whole project in miniature: shards of coloured squares, a real tiny encoder, two configs."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from golden_case import GOLDEN
from random_loss_networks import write_dino, write_vgg16

from rae_xla.data.shards import write_shards
from rae_xla.data.sources import array_source
from rae_xla.interop.checkpoint_folder import Checkpoint, list_checkpoints
from rae_xla.interop.checkpoint_tensors import CheckpointContent
from rae_xla.train.figures import unknown_names

CLASSES, IMAGES, SIZE, BATCH = 4, 48, 32, 8
ROOT = Path(__file__).parents[2]


def make_shards(folder: Path) -> str:
    """Squares whose place tells their class, on noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    images = rng.integers(0, 60, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = 16 * (label // 2), 16 * (label % 2)
        image[y : y + 16, x : x + 16] += rng.integers(100, 180, 3, dtype=np.uint8)
    out = folder / "shards"
    write_shards(array_source(images, labels), str(out), samples_per_shard=20)
    return str(out)


def make_configs(folder: Path, shards: str) -> dict[str, Path]:
    """``stage1.yaml`` and ``stage2.yaml`` on that data."""
    encoder = str(GOLDEN / "rae/dinov2/encoder")
    autoencoder = {
        "encoder_cls": "Dinov2withNorm",
        "encoder_config_path": encoder,
        "encoder_input_size": 56,
        "encoder_params": {"dinov2_path": encoder, "normalize": True},
        "decoder_config_path": str(GOLDEN / "rae/dinov2/decoder_config"),
        "decoder_patch_size": 8,
        "reshape_to_2d": True,
    }
    training = {
        "steps": 20,
        "global_batch_size": BATCH,
        "ema_decay": 0.9,
        "log_every": 1,
        "sample_every": 0,
        "num_samples": 4,
        "optimizer": {"lr": 2e-3},
        "scheduler": {"warmup_steps": 4, "warmup_from_zero": True},
    }
    shared = {
        "training": training,
        "data": {"train": shards},
        "checkpoint": {"every_steps": 10},
        "runtime": {"backend": "torch"},
    }
    model = {
        "input_size": 4,
        "patch_size": 1,
        "in_channels": 32,
        "hidden_size": [32, 48],
        "depth": [1, 1],
        "num_heads": [4, 4],
        "num_classes": CLASSES,
    }
    weights = {"pretrained_decoder_path": str(GOLDEN / "rae/dinov2/decoder.pt")}
    statistics = {"normalization_stat_path": str(GOLDEN / "rae/dinov2/stat.pt")}
    configs = {
        "stage1": {"stage_1": {"target": "stage1.RAE", "params": autoencoder}} | shared,
        "stage2": {
            "stage_1": {
                "target": "stage1.RAE",
                "params": autoencoder | weights | statistics | {"noise_tau": 0.0},
            },
            "stage_2": {"target": "stage2.models.DDT.DiTwDDTHead", "params": model},
            "sampler": {"params": {"num_steps": 5}},
            "misc": {"time_dist_shift_base": 128},
        }
        | shared,
    }
    paths = {}
    for name, content in configs.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(content))
    return paths


# What the GAN configuration trains from which step on.
PHASES = {
    0: "L1 + LPIPS",
    6: "L1 + LPIPS, and the discriminator learns",
    12: "L1 + LPIPS + GAN, and the discriminator learns",
}

# Everything from the first step on. These losses have gradients that jump: L1's where a pixel is
# hit exactly, LPIPS's and the discriminator's at their rectifiers and maxima, and 8 bits round up
# or down. A difference of 1e-7 in a pixel decides, and of 24,576 pixels each counts; the ratio of
# two gradients, the adaptive weight, then differs by 1e-3, and Adam follows the sign of what is
# nothing but rounding with its whole step. So the weight of that ratio is small here, and Adam's
# epsilon large.
SMOOTH = [
    "training.steps=10", "checkpoint.every_steps=10", "gan.loss.disc_start=0",
    "gan.loss.disc_upd_start=0", "gan.loss.disc_weight=0.01", "training.scheduler.warmup_steps=0",
    "training.optimizer.lr=2e-4", "training.optimizer.eps=1e-5",
    "gan.disc.optimizer.lr=2e-4", "gan.disc.optimizer.eps=1e-3", "training.global_seed=1",
]  # fmt: skip


def make_gan_config(folder: Path, shards: str) -> Path:
    """``gan.yaml``: stage 1 with LPIPS from the start, a discriminator that learns from step 6 and
    is felt from step 12. Its networks are tiny or of the real shape, and random.
    """
    config = yaml.safe_load(make_configs(folder, shards)["stage1"].read_text())
    recipe = {"depth": 2, "embed_dim": 32, "num_heads": 4, "patch_size": 32}
    optimizer = {
        "optimizer": {"lr": 1e-3},
        "scheduler": {"warmup_steps": 3, "warmup_from_zero": True},
    }
    config["weights"] = {"vgg16": str(write_vgg16(folder / "vgg16.pth"))}
    config["checkpoint"]["every_steps"] = 2
    config["gan"] = {
        "disc": {
            "arch": {
                "dino_ckpt_path": str(write_dino(folder / "dino.pth", recipe)),
                "recipe": recipe,
                "key_depths": [0],
                "ks": 3,
            },
            "augment": {"prob": 1.0, "cutout": 0.2},
        }
        | optimizer,
        "loss": {
            "disc_weight": 0.75,
            "perceptual_weight": 1.0,
            "disc_upd_start": 1,
            "disc_start": 2,
        },
    }
    path = folder / "gan.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def rae_xla(*arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """Run the command line as a user would, in a process of its own (see ``cli_server``)."""
    [done] = _run_at_once(arguments, [environment()], timeout)
    if done.returncode is None:
        raise subprocess.TimeoutExpired(done.args, timeout, done.stdout, done.stderr)
    return done


def rae_xla_processes(
    count: int, *arguments: object, timeout: float = 600
) -> list[subprocess.CompletedProcess]:
    """Run the command line in several processes at once, with what torchrun tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [shared | {"RANK": i, "LOCAL_RANK": i} for i in range(count)]
    environments = [environment() | {k: str(v) for k, v in e.items()} for e in own]
    return _run_at_once(arguments, environments, timeout)


def _run_at_once(
    arguments: Sequence[object], environments: Sequence[dict[str, str]], timeout: float
) -> list[subprocess.CompletedProcess]:
    command = [sys.executable, "-m", "rae_xla", *map(str, arguments)]
    place = {"arguments": command[3:], "folder": os.getcwd(), "timeout": timeout}
    with tempfile.TemporaryDirectory() as folder:
        streams = [
            {name: f"{folder}/{name}-{i}" for name in ("stdout", "stderr")}
            for i in range(len(environments))
        ]
        requests = [
            place | of | {"environment": e} for of, e in zip(streams, environments, strict=True)
        ]
        server = _command_server()
        print(json.dumps(requests), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        said = [{name: Path(path).read_text() for name, path in of.items()} for of in streams]
    return [
        subprocess.CompletedProcess(command, code, of["stdout"], of["stderr"])
        for code, of in zip(codes, said, strict=True)
    ]


@functools.cache
def _command_server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("cli_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """This environment, with the package on the path and one thread."""
    kept = {k: v for k, v in os.environ.items() if k != "CPU_NUM_DEVICES"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PJRT_DEVICE": "CPU"}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a results folder's ``metrics.jsonl``, whose names must all be known ones."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unknown = unknown_names({name for line in lines for name in line} - {"step"})
    assert not unknown, f"not in rae_xla/train/figures.py: {unknown}"
    return lines


def saved(folder: Path, step: int = 20) -> CheckpointContent:
    """What a run's checkpoint of a step holds."""
    return CheckpointContent(Checkpoint(str(folder / f"checkpoints/step-{step:08d}")))


def same_bits(one: Path, other: Path, step: int = 20) -> None:
    """See that two runs' checkpoints of a step hold the very same tensors."""
    first, second = saved(one, step), saved(other, step)
    assert list(first) == list(second)
    for part in set(first) - {"step", "config", "scheduler"}:
        ours, theirs = first[part], second[part]
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{part}: {name}"


def wait_for_checkpoint(folder: Path, step: int) -> None:
    """Wait until a run has saved this step or a later one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(found.step >= step for found in list_checkpoints(str(folder / "checkpoints"))):
            return
        time.sleep(0.005)
    raise TimeoutError(folder)


def train_and_kill(
    stage: str,
    config: Path,
    folder: Path,
    *overrides: str,
    step: int = 10,
    pictures: bool = True,
) -> None:
    """Start a training and kill it when the checkpoint of a step is there.

    With ``pictures`` it draws one at every step, which changes no number and makes a tiny run slow
    beside the thread that saves.
    """
    slow = ["training.sample_every=1"] if pictures else []
    arguments = ["train", stage, "--config", config, "--results-dir", folder, *slow, *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "rae_xla", *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_checkpoint(folder, step)
    finally:
        process.kill()
        process.wait()
