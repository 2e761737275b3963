"""Versions that fit each other, variables that change what a run does, and wandb."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

import rae_xla
from rae_xla.doctor.finding import Finding, Patient, Status
from rae_xla.train.wandb_sink import wandb_place

VERSIONS, ENVIRONMENT, TRACKING = "versions", "environment", "tracking"

LIBRARIES = ("torchvision", "transformers", "numpy", "pillow", "gcsfs", "wandb")

# What changes how a run behaves, and why one may wonder.
VARIABLES = (
    "PJRT_DEVICE",
    "CPU_NUM_DEVICES",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_BOUNDS",
    "TPU_VISIBLE_CHIPS",
    "LIBTPU_INIT_ARGS",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "STORAGE_EMULATOR_HOST",
    "RAE_XLA_GCS_TIMEOUT",
    "PROJECT",
    "ENTITY",
    "WANDB_PROJECT",
    "WANDB_ENTITY",
    "WANDB_BASE_URL",
    "WANDB_MODE",
    "WANDB_DIR",
)

# Those that spoil a run: what they do, and what takes their place.
HARMFUL = {
    "XLA_USE_BF16": "makes every float a bf16, weights too; unset it, runtime.precision=bf16 does "
    "what you want",
    "XLA_DOWNCAST_BF16": "makes every float a bf16, weights too; unset it, runtime.precision=bf16 "
    "does what you want",
    "XLA_USE_SPMD": "is obsolete and may start the devices too early; unset it",
    "XLA_IR_DEBUG": "makes the tracing of every step slow; unset it for training",
    "XLA_HLO_DEBUG": "makes the tracing of every step slow; unset it for training",
    "PT_XLA_DEBUG_LEVEL": "makes the tracing of every step slow; unset it for training",
}


def check_versions(patient: Patient) -> Iterator[Finding]:
    """Python, torch and what pairs with it."""
    yield Finding(VERSIONS, "rae_xla", "ok", rae_xla.__version__)
    python = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Finding(VERSIONS, "python", "ok", python)
    else:
        fix = f"Python {python} is not among those this is tested with: use 3.10, 3.11 or 3.12"
        yield Finding(VERSIONS, "python", "warn", python, fix)
    cuda = f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    yield Finding(VERSIONS, "torch", "ok", f"{torch.__version__}{cuda}")
    yield _torch_xla()
    for name in LIBRARIES:
        found = installed(name)
        if found is not None:
            yield Finding(VERSIONS, name, "ok", found)
        else:
            fix = f"{name} is not installed: run install_spmd.sh"
            yield Finding(VERSIONS, name, "FAIL", "not installed", fix)


def _torch_xla() -> Finding:
    found, own = installed("torch_xla"), torch.__version__
    if found is None:
        return Finding(VERSIONS, "torch_xla", "none", "not installed (needed for TPUs alone)")
    if found.split(".")[:2] != own.split(".")[:2]:
        fix = f"torch_xla {found} works with torch {'.'.join(found.split('.')[:2])} only, and not "
        return Finding(
            VERSIONS, "torch_xla", "FAIL", found, f"{fix}with {own}: run install_spmd.sh"
        )
    libtpu = installed("libtpu")
    return Finding(VERSIONS, "torch_xla", "ok", found + (f", libtpu {libtpu}" if libtpu else ""))


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_environment(patient: Patient) -> Iterator[Finding]:
    """Variables of the environment; keys and passwords are not printed."""
    for name in VARIABLES:
        if (value := os.environ.get(name)) is None:
            continue
        if name == "STORAGE_EMULATOR_HOST" and value != "default":
            fix = f"gs:// means {value} and not Google: unset {name} if that is no test"
            yield Finding(ENVIRONMENT, name, "warn", value, fix)
        else:
            yield Finding(ENVIRONMENT, name, "ok", value)
    for name, harm in HARMFUL.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding(ENVIRONMENT, name, "warn", os.environ[name], f"{name} {harm}")


def check_tracking(patient: Patient) -> Iterator[Finding]:
    """Whether wandb could log what the run sends there."""
    settings = patient.config.tracking
    if patient.named and not settings.wandb:
        yield Finding(TRACKING, "wandb", "none", "tracking.wandb is false: metrics.jsonl alone")
        return
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        text = f"WANDB_MODE={mode}: it stays on the disk, and `wandb sync` sends it later"
        yield Finding(TRACKING, "wandb", "ok", text)
        return
    wanted: Status = "FAIL" if settings.wandb else "none"
    ways = "`wandb login`, or WANDB_API_KEY; or WANDB_MODE=offline, to send it later"
    try:
        known = _logged_in()
    except Exception as error:  # whatever wandb raises: a wrong key, no network
        text = f"the key could not be verified: {error}"
        yield Finding(TRACKING, "wandb", wanted, text, f"wandb: {text}. {ways}")
        return
    if known:
        where = wandb_place(settings)["project"]
        yield Finding(TRACKING, "wandb", "ok", f"logged in; project {where}")
    else:
        fix = f"tracking.wandb is true but wandb is not logged in: {ways}"
        yield Finding(TRACKING, "wandb", wanted, "not logged in", fix)


def _logged_in() -> bool:
    import wandb

    if key := os.environ.get("WANDB_KEY"):  # as the trainer takes it
        os.environ.setdefault("WANDB_API_KEY", key)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        return bool(wandb.login(prompt=False))
