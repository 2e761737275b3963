"""Checks of the devices: backend, mesh, batch, speed, and the clocks of the hosts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

from rae_xla.config import split_batch
from rae_xla.runtime import Backend, start
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed
from rae_xla.tools.doctor.finding import DoctorContext, Finding

DEVICES, SPEED, HOSTS = "devices", "speed", "hosts"

MAX_SKEW = 1.0
"""Seconds between the clocks of two hosts; a larger skew breaks signed requests to the storage."""

MIN_PEAK_FRACTION = 0.4
"""Fraction of its peak FLOP/s that an accelerator should reach with large matrices."""

ACCELERATOR_MATRIX, CPU_MATRIX = 8192, 512  # rows and columns
ACCELERATOR_ELEMENTS, CPU_ELEMENTS = 1 << 26, 1 << 20  # of the all-reduce


def check_devices(context: DoctorContext) -> Iterator[Finding]:
    """Start the backend, and check that the mesh and the batch fit its devices."""
    settings, mesh = context.config.runtime, context.config.mesh
    backend = start(settings, mesh, seed=0)
    context.backend = backend
    chosen = " (runtime.backend=auto)" if settings.backend == "auto" else ""
    yield Finding(DEVICES, "backend", "ok", f"{backend.name}{chosen}: {backend.description}")
    accelerator = backend.accelerator()
    if accelerator is not None:
        peak, memory_size = accelerator.peak_flops / 1e12, accelerator.hbm_bytes / 1e9
        text = f"{accelerator.name}: {peak:.0f} TFLOP/s, {memory_size:.0f} GB"
        yield Finding(DEVICES, "accelerator", "ok", text)
    elif backend.device.type != "cpu" and os.environ.get("PJRT_DEVICE") != "CPU":
        fix = "perf/mfu will not be logged: rae_xla does not know the peak FLOP/s of this device"
        yield Finding(DEVICES, "accelerator", "warn", "unknown", fix)
    if (memory := backend.memory()) is not None and memory.total is not None:
        text = f"{memory.used / 1e9:.1f} of {memory.total / 1e9:.1f} GB in use"
        yield Finding(DEVICES, "memory", "ok", text)
    if context.config_given:
        split = split_batch(context.config, backend.mesh.batch_shards)
        text = f"{split.global_batch_size} images per step, {split.per_device} per device and pass"
        yield Finding(DEVICES, "batch", "ok", text)
    for warning in backend.warnings():
        yield Finding(DEVICES, "warning", "warn", warning, warning)


def check_speed(context: DoctorContext) -> Iterator[Finding]:
    """Time a matrix product on every device, and an all-reduce over all of them."""
    backend = context.backend
    if backend is None:
        yield Finding(SPEED, "", "none", "no devices")
        return
    accelerator = backend.accelerator()
    speed = matmul_speed(backend, ACCELERATOR_MATRIX if accelerator else CPU_MATRIX)
    text = f"{speed / 1e12:.3g} TFLOP/s per device"
    if accelerator is None:
        yield Finding(SPEED, "matmul", "ok", text)
    else:
        fraction = speed / accelerator.peak_flops
        fix = (
            f"the devices reach only {fraction:.0%} of their peak in a matrix product: check that "
            "no other program uses them, and that they are not throttled"
        )
        slow = fraction < MIN_PEAK_FRACTION
        text += f", {fraction:.0%} of the peak"
        yield Finding(SPEED, "matmul", "warn" if slow else "ok", text, fix if slow else None)
    rate = all_reduce_speed(backend, ACCELERATOR_ELEMENTS if accelerator else CPU_ELEMENTS)
    if rate is None:
        yield Finding(SPEED, "all-reduce", "none", "a single device")
    else:
        yield Finding(SPEED, "all-reduce", "ok", f"{rate / 1e9:.3g} GB/s per device")


def check_clocks(context: DoctorContext) -> Iterator[Finding]:
    """Compare the clocks of the hosts."""
    backend = context.backend
    if backend is None or backend.process_count == 1:
        yield Finding(HOSTS, "clocks", "none", f"a single process, on {socket.gethostname()}")
        return
    yield clock_finding(clock_skew(backend), backend.process_count)


def clock_skew(backend: Backend) -> float:
    """Return the seconds between the earliest and the latest clock, up to message latency."""
    backend.all_gather_text("barrier")  # so that all processes read their clocks at about one time
    clocks = [float(text) for text in backend.all_gather_text(repr(time.time()))]
    return max(clocks) - min(clocks)


def clock_finding(skew: float, count: int) -> Finding:
    """Return the finding for a clock skew in seconds between ``count`` processes."""
    text = f"{skew:.2f} s between the clocks of {count} processes"
    if skew <= MAX_SKEW:
        return Finding(HOSTS, "clocks", "ok", text)
    fix = f"{text}: synchronise them (`timedatectl set-ntp true` on every host)"
    return Finding(HOSTS, "clocks", "warn", text, fix)
