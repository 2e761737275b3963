"""Output of forecasts for GPUs as text, table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rae_xla.tools.plan.gpu.cards import FRAGMENTATION, RESERVED
from rae_xla.tools.plan.gpu.forecast import GpuForecast
from rae_xla.tools.plan.gpu.timing import FAST, SLOW, StepTime

MIB, GIB = 2**20, 2**30


def gpu_forecast_text(forecast: GpuForecast) -> str:
    """Format one forecast as about twenty lines of text."""
    case = forecast.case
    accumulate = case.config.training.grad_accum_steps
    batch = f"{case.cluster.gpus} GPUs x {accumulate} x {case.rows}"
    lines = [
        f"{case.cluster} ({case.cluster.card.driver_name}), {case.batch:,} images per step "
        f"({batch}), mesh {case.mesh}, {case.settings}",
        f"  counted, operation by operation, without a GPU ({forecast.count.phase})",
        *_memory_lines(forecast),
        *_communication_lines(forecast),
        *_time_lines(forecast),
    ]
    return "\n".join(lines + [f"  assumed: {note}" for note in forecast.notes])


def _memory_lines(forecast: GpuForecast) -> list[str]:
    case, count, memory = forecast.case, forecast.count, forecast.memory
    card = case.cluster.card
    parts = sorted(count.peak_by_kind.items(), key=lambda item: -item[1])
    at_peak = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in parts if size >= MIB)
    lines = [
        f"    memory per GPU  {count.peak / GIB:.2f} of {card.usable_bytes / GIB:.2f} GiB: "
        + ("fits" if forecast.fits else "DOES NOT FIT"),
        f"      at the peak: {at_peak} GiB",
        f"      {memory.fixed / GIB:.2f} GiB and {memory.per_image / MIB:,.1f} MiB for each image "
        f"of a micro-batch: at most {forecast.largest_rows:,} images",
    ]
    if not forecast.fits:
        lines.append(f"      {_advice(forecast)}")
    return lines


def _advice(forecast: GpuForecast) -> str:
    steps = forecast.accumulation
    if steps is not None:
        return f"fits with training.grad_accum_steps={steps}"
    runtime = forecast.case.config.runtime
    options = []
    if runtime.precision != "bf16":
        options.append("runtime.precision=bf16")
    if not runtime.compile:
        options.append("runtime.compile=true")
    if runtime.remat < 1:
        options.append("runtime.remat=1")
    options.append("more GPUs with mesh.ici.fsdp")
    return f"no accumulation is enough: try {', '.join(options)}"


def _communication_lines(forecast: GpuForecast) -> list[str]:
    lines = []
    for sent in sorted(forecast.count.sent, key=lambda sent: -sent.num_bytes):
        if sent.num_bytes < MIB:
            continue
        axis = forecast.case.axis_of(sent.ranks)
        speed = forecast.case.cluster.bandwidth(sent.ranks) / 1e9
        lines.append(
            f"    {axis}: {sent.kind} sends {sent.num_bytes / MIB:,.0f} MiB in {sent.count} "
            f"operations, {len(sent.ranks)} GPUs at {speed:.0f} GB/s"
        )
    return lines


def _time_lines(forecast: GpuForecast) -> list[str]:
    case, counts, fast, slow = (
        forecast.case, forecast.model_counts, forecast.fast, forecast.slow
    )  # fmt: skip
    executed = forecast.count.flops * case.cluster.gpus
    extra = executed / (counts.step * case.batch) - 1
    recomputed = f", plus {extra:.0%} for recomputation" if extra > 0.02 else ""
    gpus, hours = case.cluster.gpus, (forecast.hours(fast), forecast.hours(slow))
    price = ""
    if forecast.price is not None:
        price = ", {:,.0f} to {:,.0f} at the given price".format(
            *(forecast.price * gpus * h for h in hours)
        )
    return [
        "  modelled (a range; its model is explained in docs/plan.md)",
        f"    {counts.trained / 1e6:,.1f} M parameters trained, {counts.frozen / 1e6:,.1f} M "
        f"frozen; {counts.step / 1e9:,.0f} GFLOP per image{recomputed}",
        f"    fast: {_parts(fast)}",
        f"    slow: {_parts(slow)}",
        f"    step {_ms(fast.step)} to {_ms(slow.step)}, MFU {forecast.utilisation(slow):.0%} to "
        f"{forecast.utilisation(fast):.0%}, {case.batch / slow.step:,.0f} to "
        f"{case.batch / fast.step:,.0f} images/s",
        f"    {forecast.steps:,} steps: {hours[0]:,.1f} to {hours[1]:,.1f} h, "
        f"{hours[0] * gpus:,.0f} to {hours[1] * gpus:,.0f} GPU-hours{price}",
    ]


def _parts(time: StepTime) -> str:
    host = f", host {_ms(time.launch)}" if time.launch else ""
    return (
        f"products {_ms(time.products)}, other operations {_ms(time.other)}, communication "
        f"{_ms(time.links)}{host}; limit: {time.limit}"
    )


def gpu_forecast_table(forecasts: Sequence[GpuForecast]) -> str:
    """Format several forecasts as a table, one line each."""
    header = (
        "GPUs", "settings", "batch", "images/GPU", "fits", "GiB", "of", "fixed GiB", "MiB/image",
        "at most", "step s", "MFU", "images/s",
    )  # fmt: skip
    rows = [header] + [_row(forecast) for forecast in forecasts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(forecast: GpuForecast) -> tuple[str, ...]:
    case, memory, fast, slow = forecast.case, forecast.memory, forecast.fast, forecast.slow
    return (
        str(case.cluster),
        case.settings,
        f"{case.batch:,}",
        str(case.rows),
        "yes" if forecast.fits else "no",
        f"{forecast.count.peak / GIB:.1f}",
        f"{case.cluster.card.usable_bytes / GIB:.1f}",
        f"{memory.fixed / GIB:.1f}",
        f"{memory.per_image / MIB:,.0f}",
        f"{forecast.largest_rows:,}",
        f"{fast.step:.2f}-{slow.step:.2f}",
        f"{forecast.utilisation(slow):.0%}-{forecast.utilisation(fast):.0%}",
        f"{case.batch / slow.step:,.0f}-{case.batch / fast.step:,.0f}",
    )


def gpu_forecast_json(forecast: GpuForecast) -> dict[str, Any]:
    """Return a forecast as plain values: ``counted`` from the step, ``model`` modelled."""
    case, count = forecast.case, forecast.count
    return {
        "gpus": str(case.cluster),
        "card": asdict(case.cluster.card),
        "batch": case.batch,
        "rows_per_gpu": case.rows,
        "mesh": str(case.mesh),
        "settings": case.settings,
        "fits": forecast.fits,
        "usable_bytes": case.cluster.card.usable_bytes,
        "counted": asdict(count),
        "memory": asdict(forecast.memory) | {"largest_rows": forecast.largest_rows},
        "accumulation": forecast.accumulation,
        "model": {
            "arithmetic": asdict(forecast.model_counts),
            "reserved_bytes": RESERVED,
            "fragmentation": FRAGMENTATION,
            "assumptions": {"fast": asdict(FAST), "slow": asdict(SLOW)},
            "fast": _time_json(forecast, forecast.fast),
            "slow": _time_json(forecast, forecast.slow),
            "steps": forecast.steps,
        },
        "assumed": forecast.notes,
    }


def _time_json(forecast: GpuForecast, time: StepTime) -> dict[str, Any]:
    hours = forecast.hours(time)
    price = forecast.price
    return asdict(time) | {
        "step": time.step,
        "limit": time.limit,
        "mfu": forecast.utilisation(time),
        "images_per_second": forecast.case.batch / time.step,
        "hours": hours,
        "gpu_hours": hours * forecast.case.cluster.gpus,
        "price": None if price is None else price * hours * forecast.case.cluster.gpus,
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"
