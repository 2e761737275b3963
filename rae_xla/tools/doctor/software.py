"""Checks of package versions, environment variables and wandb."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from rae_xla.tools.doctor.finding import DoctorContext, Finding, Status
from rae_xla.train.tracking.wandb_sink import wandb_place
from rae_xla.version import __version__

VERSIONS, ENVIRONMENT, TRACKING = "versions", "environment", "tracking"

LIBRARIES = ("torchvision", "transformers", "numpy", "pillow", "gcsfs", "wandb")

# Environment variables that change the behaviour of a run; those that are set are printed.
VARIABLES = (
    "PJRT_DEVICE",
    "CPU_NUM_DEVICES",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_BOUNDS",
    "TPU_VISIBLE_CHIPS",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
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

# Environment variables that harm a run: their effect, and what to do.
HARMFUL = {
    "XLA_USE_BF16": "converts all fp32 tensors to bf16, weights included: unset it and set "
    "runtime.precision=bf16",
    "XLA_DOWNCAST_BF16": "converts all fp32 tensors to bf16, weights included: unset it and set "
    "runtime.precision=bf16",
    "XLA_USE_SPMD": "is obsolete and may initialise the devices too early: unset it",
    "XLA_IR_DEBUG": "slows down the tracing of every step: unset it for training",
    "XLA_HLO_DEBUG": "slows down the tracing of every step: unset it for training",
    "PT_XLA_DEBUG_LEVEL": "slows down the tracing of every step: unset it for training",
}


def check_versions(context: DoctorContext) -> Iterator[Finding]:
    """Check the versions of Python, torch, torch_xla and other libraries."""
    yield Finding(VERSIONS, "rae_xla", "ok", __version__)
    python = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        yield Finding(VERSIONS, "python", "ok", python)
    else:
        fix = f"rae_xla is not tested with Python {python}: use 3.10, 3.11 or 3.12"
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
    found, torch_version = installed("torch_xla"), torch.__version__
    if found is None:
        return Finding(VERSIONS, "torch_xla", "none", "not installed (needed only for TPUs)")
    if found.split(".")[:2] != torch_version.split(".")[:2]:
        needed = ".".join(found.split(".")[:2])
        fix = f"torch_xla {found} needs torch {needed}, not {torch_version}: run install_spmd.sh"
        return Finding(VERSIONS, "torch_xla", "FAIL", found, fix)
    libtpu = installed("libtpu")
    return Finding(VERSIONS, "torch_xla", "ok", found + (f", libtpu {libtpu}" if libtpu else ""))


def installed(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_environment(context: DoctorContext) -> Iterator[Finding]:
    """Report environment variables that affect a run; never keys or passwords."""
    for name in VARIABLES:
        if (value := os.environ.get(name)) is None:
            continue
        if name == "STORAGE_EMULATOR_HOST" and value != "default":
            fix = (
                f"gs:// refers to {value}, not to Google Cloud: unset {name} unless this is a test"
            )
            yield Finding(ENVIRONMENT, name, "warn", value, fix)
        else:
            yield Finding(ENVIRONMENT, name, "ok", value)
    for name, harm in HARMFUL.items():
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding(ENVIRONMENT, name, "warn", os.environ[name], f"{name} {harm}")


def check_tracking(context: DoctorContext) -> Iterator[Finding]:
    """Check that wandb can log the run, if the configuration uses it."""
    settings = context.config.tracking
    if context.config_given and not settings.wandb:
        yield Finding(
            TRACKING, "wandb", "none", "tracking.wandb is false: metrics go to metrics.jsonl only"
        )
        return
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        text = f"WANDB_MODE={mode}: the run is stored locally; `wandb sync` uploads it later"
        yield Finding(TRACKING, "wandb", "ok", text)
        return
    status: Status = "FAIL" if settings.wandb else "none"
    ways = "run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline, to upload later"
    try:
        known = _logged_in()
    except Exception as error:  # wandb raises many types: a wrong key, no network
        text = f"the key could not be verified: {error}"
        yield Finding(TRACKING, "wandb", status, text, f"wandb: {text}. {ways}")
        return
    if known:
        where = wandb_place(settings)["project"]
        yield Finding(TRACKING, "wandb", "ok", f"logged in; project {where}")
    else:
        fix = f"tracking.wandb is true but wandb is not logged in: {ways}"
        yield Finding(TRACKING, "wandb", status, "not logged in", fix)


def _logged_in() -> bool:
    import wandb

    if key := os.environ.get("WANDB_KEY"):  # the trainer accepts it, too
        os.environ.setdefault("WANDB_API_KEY", key)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        return bool(wandb.login(prompt=False))
