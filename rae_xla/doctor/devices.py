"""Devices, the mesh they make, how fast they multiply and talk, and the clocks of the hosts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

from rae_xla.config import check_mesh
from rae_xla.doctor.finding import Finding, Patient
from rae_xla.runtime import Runtime, start
from rae_xla.runtime.measure import all_reduce_speed, matmul_speed

DEVICES, SPEED, HOSTS = "devices", "speed", "hosts"

MAX_SKEW = 1.0
"""Seconds between the clocks of two hosts: more confuses their logs, and signed requests."""

LOW_SHARE = 0.4
"""Of its peak a chip should reach at least with matrices that are large."""

CHIP_MATRIX, CPU_MATRIX = 8192, 512
CHIP_NUMBERS, CPU_NUMBERS = 1 << 26, 1 << 20


def check_devices(patient: Patient) -> Iterator[Finding]:
    """Start the backend, see that mesh and batch fit it, and put it to work."""
    settings, mesh = patient.config.runtime, patient.config.mesh
    runtime = start(settings, mesh, seed=0)
    patient.runtime = runtime
    chosen = " (runtime.backend=auto)" if settings.backend == "auto" else ""
    yield Finding(DEVICES, "backend", "ok", f"{runtime.backend}{chosen}: {runtime.description}")
    chip = runtime.chip()
    if chip is not None:
        text = f"{chip.name}: {chip.peak_flops / 1e12:.0f} TFLOP/s, {chip.hbm_bytes / 1e9:.0f} GB"
        yield Finding(DEVICES, "chip", "ok", text)
    elif runtime.device.type != "cpu" and os.environ.get("PJRT_DEVICE") != "CPU":
        fix = "perf/mfu will not be logged: the peak of this chip is not known to rae_xla"
        yield Finding(DEVICES, "chip", "warn", "unknown", fix)
    if (memory := runtime.memory()) is not None and memory.total is not None:
        text = f"{memory.used / 1e9:.1f} of {memory.total / 1e9:.1f} GB in use"
        yield Finding(DEVICES, "memory", "ok", text)
    if patient.named:
        split = check_mesh(patient.config, runtime.mesh.batch_parts)
        text = f"{split.global_batch_size} images a step, {split.per_device} at a time on a device"
        yield Finding(DEVICES, "batch", "ok", text)
    for warning in runtime.warnings():
        yield Finding(DEVICES, "warning", "warn", warning, warning)


def check_speed(patient: Patient) -> Iterator[Finding]:
    """A matrix product on every device, and a sum over all of them."""
    runtime = patient.runtime
    if runtime is None:
        yield Finding(SPEED, "", "none", "no devices")
        return
    chip = runtime.chip()
    speed = matmul_speed(runtime, CHIP_MATRIX if chip else CPU_MATRIX)
    text = f"{speed / 1e12:.3g} TFLOP/s a device"
    if chip is None:
        yield Finding(SPEED, "matmul", "ok", text)
    else:
        share = speed / chip.peak_flops
        fix = (
            f"the devices reach {share:.0%} of their peak in a matrix product: see that nothing "
            "else uses them, and that they are not throttled"
        )
        slow = share < LOW_SHARE
        text += f", {share:.0%} of the peak"
        yield Finding(SPEED, "matmul", "warn" if slow else "ok", text, fix if slow else None)
    rate = all_reduce_speed(runtime, CHIP_NUMBERS if chip else CPU_NUMBERS)
    if rate is None:
        yield Finding(SPEED, "all-reduce", "none", "a single device")
    else:
        yield Finding(SPEED, "all-reduce", "ok", f"{rate / 1e9:.3g} GB/s a device")


def check_clocks(patient: Patient) -> Iterator[Finding]:
    """What the clocks of the hosts show at one moment."""
    runtime = patient.runtime
    if runtime is None or runtime.process_count == 1:
        yield Finding(HOSTS, "clocks", "none", f"a single process, on {socket.gethostname()}")
        return
    yield clock_finding(clock_skew(runtime), runtime.process_count)


def clock_skew(runtime: Runtime) -> float:
    """Seconds between the earliest and the latest clock, exact to the time a message takes."""
    runtime.exchange("together")  # all go on from here at about the same time
    clocks = [float(text) for text in runtime.exchange(repr(time.time()))]
    return max(clocks) - min(clocks)


def clock_finding(skew: float, count: int) -> Finding:
    """What a skew of so many seconds between so many processes means."""
    text = f"{skew:.2f} s between the clocks of {count} processes"
    if skew <= MAX_SKEW:
        return Finding(HOSTS, "clocks", "ok", text)
    fix = f"{text}: set them by a time server (`timedatectl set-ntp true` on every host)"
    return Finding(HOSTS, "clocks", "warn", text, fix)
