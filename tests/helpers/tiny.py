"""A complete project in miniature: shards of coloured squares, a tiny real encoder, two configs."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from golden_case import GOLDEN
from random_loss_networks import write_dino, write_vgg16

from rae_xla.checkpoint.manager import Checkpoint, list_checkpoints
from rae_xla.checkpoint.tensors import CheckpointContent
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.train.metrics import unknown_names

CLASSES, IMAGES, SIZE, BATCH = 4, 48, 32, 8
ROOT = Path(__file__).parents[2]


def make_shards(folder: Path) -> str:
    """Write shards of noise with a square whose position encodes the class; return their path."""
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
    """Write ``stage1.yaml`` and ``stage2.yaml`` for this data; return their paths by task."""
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


# Losses of the GAN configuration by the step from which they are active.
PHASES = {
    0: "L1 + LPIPS",
    6: "L1 + LPIPS, with discriminator updates",
    12: "L1 + LPIPS + GAN, with discriminator updates",
}

# All losses are active from the first step. Their gradients are discontinuous: L1 where a pixel is
# exact, LPIPS and the discriminator at their rectifiers and maxima, and the rounding to 8 bits. A
# difference of 1e-7 in one of 24,576 pixels is enough to change them; the adaptive weight, a ratio
# of two gradients, then differs by 1e-3, and Adam turns the sign of a rounding error into a full
# step. Hence the small weight of the discriminator and the large epsilon of Adam.
SMOOTH = [
    "training.steps=5", "checkpoint.every_steps=5", "gan.loss.disc_start=0",
    "gan.loss.disc_upd_start=0", "gan.loss.disc_weight=0.01", "training.scheduler.warmup_steps=0",
    "training.optimizer.lr=2e-4", "training.optimizer.eps=1e-5",
    "gan.disc.optimizer.lr=2e-4", "gan.disc.optimizer.eps=1e-3", "training.global_seed=1",
]  # fmt: skip


def make_gan_config(folder: Path, shards: str) -> Path:
    """Write ``gan.yaml``, stage 1 with all losses (see ``PHASES``), and return its path.

    The networks of the losses are random; VGG16 has its real shape, the others are tiny.
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
    [done] = _run_together(arguments, [environment()], timeout)
    if done.returncode is None:
        raise subprocess.TimeoutExpired(done.args, timeout, done.stdout, done.stderr)
    return done


def rae_xla_processes(
    count: int, *arguments: object, timeout: float = 600
) -> list[subprocess.CompletedProcess]:
    """Run the command line in several processes with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [shared | {"RANK": i, "LOCAL_RANK": i} for i in range(count)]
    environments = [environment() | {k: str(v) for k, v in rank.items()} for rank in ranks]
    return _run_together(arguments, environments, timeout)


@dataclass(frozen=True)
class StartedCommand:
    """A command line that runs in a process of its own."""

    pid: int
    on_xla: bool

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 600) -> int | None:
        """Return the exit code (negative for a signal, None if it had to be killed)."""
        [code] = _ask_server(self.on_xla, {"wait": [self.pid], "timeout": timeout})
        return code


def start_rae_xla(*arguments: object, log: Path | str = os.devnull) -> StartedCommand:
    """Start the command line in the background; its output is appended to ``log``."""
    on_xla = _runs_on_xla(arguments)
    command = _command(arguments, environment(), str(log), str(log))
    [pid] = _ask_server(on_xla, {"start": [command]})
    return StartedCommand(pid, on_xla)


def _run_together(
    arguments: Sequence[object], environments: Sequence[dict[str, str]], timeout: float
) -> list[subprocess.CompletedProcess]:
    on_xla = _runs_on_xla(arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/stdout-{i}", f"{folder}/stderr-{i}") for i in range(len(environments))]
        commands = [
            _command(arguments, variables, *pair)
            for variables, pair in zip(environments, files, strict=True)
        ]
        pids = _ask_server(on_xla, {"start": commands})
        codes = _ask_server(on_xla, {"wait": pids, "timeout": timeout})
        texts = [[Path(path).read_text() for path in pair] for pair in files]
    command_line = [sys.executable, "-m", "rae_xla", *map(str, arguments)]
    return [
        subprocess.CompletedProcess(command_line, code, stdout, stderr)
        for code, (stdout, stderr) in zip(codes, texts, strict=True)
    ]


def _command(
    arguments: Sequence[object], variables: dict[str, str], stdout: str, stderr: str
) -> dict[str, object]:
    return {
        "arguments": list(map(str, arguments)),
        "environment": variables,
        "folder": os.getcwd(),
        "stdout": stdout,
        "stderr": stderr,
    }


def _runs_on_xla(arguments: Sequence[object]) -> bool:
    return "runtime.backend=xla" in arguments


def _ask_server(on_xla: bool, request: dict[str, object]) -> list:
    server = _command_server(on_xla)
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _command_server(on_xla: bool) -> subprocess.Popen:
    """Start the server of commands that run on XLA, or of the others."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("cli_server.py")), *["xla"] * on_xla],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    """Return the environment of a command: the package on the path, one thread, XLA on the CPU."""
    kept = {k: v for k, v in os.environ.items() if k != "CPU_NUM_DEVICES"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PJRT_DEVICE": "CPU"}


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl``, whose names must all be known metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    unknown = unknown_names({name for line in lines for name in line} - {"step"})
    assert not unknown, f"not in rae_xla/train/metrics.py: {unknown}"
    return lines


def saved(folder: Path, step: int = 20) -> CheckpointContent:
    """Return the content of the checkpoint of a step."""
    return CheckpointContent(Checkpoint(str(folder / f"checkpoints/step-{step:08d}")))


def same_bits(one: Path, other: Path, step: int = 20) -> None:
    """Assert that the checkpoints of two runs contain exactly the same tensors."""
    first, second = saved(one, step), saved(other, step)
    assert list(first) == list(second)
    for part in set(first) - {"step", "config", "scheduler"}:
        ours, theirs = first[part], second[part]
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{part}: {name}"


def wait_for_checkpoint(folder: Path, step: int) -> None:
    """Wait until a run has saved the checkpoint of this step or of a later one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(found.step >= step for found in list_checkpoints(str(folder / "checkpoints"))):
            return
        time.sleep(0.005)
    raise TimeoutError(folder)


def train_and_kill(
    task: str,
    config: Path,
    folder: Path,
    *overrides: str,
    step: int = 10,
    sample_images: bool = True,
) -> None:
    """Start a training and kill it once the checkpoint of a step exists.

    With ``sample_images`` the run samples images at every step, which changes no number and slows a
    tiny run down compared with the thread that saves.
    """
    slow = ["training.sample_every=1"] if sample_images else []
    arguments = ["train", task, "--config", config, "--results-dir", folder, *slow, *overrides]
    process = start_rae_xla(*arguments)
    try:
        wait_for_checkpoint(folder, step)
    finally:
        process.kill()
        process.wait()
