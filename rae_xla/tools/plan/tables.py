"""Output of forecasts as text and JSON. Both separate compiler results from modelled numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rae_xla.tools.plan.collectives import bytes_sent_by_kind
from rae_xla.tools.plan.compiled_step import CompiledStep
from rae_xla.tools.plan.forecast import Forecast

MIB, GIB, GB = 2**20, 2**30, 1e9


def forecast_text(forecast: Forecast, effort: str) -> str:
    """Format one forecast as about twenty lines of text."""
    case, topology = forecast.case, forecast.case.topology
    lines = [
        f"{topology.accelerator} ({topology}, {topology.chips} chips), {case.batch} images per "
        f"step, mesh {case.mesh}, {case.config.runtime.precision}",
    ]
    if forecast.step is not None:
        lines += _compiled_lines(forecast, forecast.step, effort)
    if forecast.not_compiled:
        lines.append(f"  NOT COMPILED: {forecast.not_compiled}")
    lines += _model_lines(forecast)
    return "\n".join(lines + [f"  assumed: {note}" for note in forecast.notes])


def _compiled_lines(forecast: Forecast, step: CompiledStep, effort: str) -> list[str]:
    result, generation = step.result, forecast.case.topology.generation
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        f"  compiled in {result.seconds:.0f} s, effort {effort} ({versions})",
        f"    step: {step.phase}",
        f"    HBM per chip  {step.hbm_bytes / GIB:.2f} of {generation.hbm_bytes / GIB:.2f} GiB: "
        + ("fits" if forecast.fits else "DOES NOT FIT"),
        "      " + ", ".join(_memory_parts(step)),
    ]
    if step.peak is not None:
        kinds = sorted(step.peak.by_kind.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds)
        lines.append(f"      temporaries at the peak (estimated): {parts} GiB")
    if not result.succeeded:
        return lines
    minimum = forecast.fsdp_minimum
    lines.append(
        f"    sent per chip {step.bytes_sent / MIB:,.0f} MiB = {_ratio(step.bytes_sent, minimum)} "
        f"(FSDP minimum {minimum / MIB:,.0f} MiB)"
    )
    by_kind = bytes_sent_by_kind(step.collectives)
    for kind, num_bytes in sorted(by_kind.items(), key=lambda item: -item[1]):
        of_kind = [c for c in step.collectives if c.kind == kind]
        types = "+".join(dict.fromkeys(c.dtypes for c in of_kind if c.bytes_sent > MIB)) or "small"
        count = sum(c.count for c in of_kind)
        lines.append(f"      {kind:<18} {num_bytes / MIB:9,.0f} MiB in {count:5d}  {types}")
    lines += [f"      FAULT: {fault}" for fault in step.faults]
    lines.append(
        f"    bytes accessed {result.bytes_accessed / GB:.0f} GB (XLA's count: loop bodies once, "
        f"on-chip memory included); {step.hbm_traffic / GB:.0f} GB with all iterations (estimated)"
    )
    if step.unknown_loops:
        lines.append(f"      loops of unknown length, counted once: {len(step.unknown_loops)}")
    return lines


def _memory_parts(step: CompiledStep) -> list[str]:
    result = step.result
    parts = {kind: size for kind, size in step.arguments.items() if size >= MIB}
    if result.succeeded:
        parts["padding and small inputs"] = result.arguments - sum(parts.values())
        parts["new outputs"] = result.outputs - result.aliased
        parts["temporaries (activations, gradients, gathered weights)"] = result.temporaries
        parts["program"] = result.code
    parts["resident, not used by the step"] = step.idle_bytes
    return [f"{name} {size / GIB:.2f}" for name, size in parts.items() if size >= MIB]


def _model_lines(forecast: Forecast) -> list[str]:
    times, cost, counts = forecast.roofline, forecast.cost, forecast.counts
    state = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in forecast.state_bytes.items())
    compiled = forecast.step is not None and forecast.step.result.succeeded
    source = "of the compiled step" if compiled else "without compilation"
    price = "" if cost.price is None else f", {cost.price:,.0f} at the given price"
    slices = f", network {_ms(times.network)}" if forecast.case.mesh.slices > 1 else ""
    return [
        "  modelled (roofline: each resource at its peak; memory time within a factor of 2)",
        f"    {counts.trained / 1e6:,.1f} M parameters trained, {counts.frozen / 1e6:,.1f} M "
        f"frozen; evenly sharded GiB per chip: {state}",
        f"    {counts.step / 1e9:,.0f} GFLOP per image, "
        f"{counts.step * forecast.case.batch / 1e12:,.1f} TFLOP per step" + _recomputed(forecast),
        f"    time {source}: compute {_ms(times.compute)}, memory {_ms(times.memory)}, "
        f"interconnect {_ms(times.interconnect)}{slices}",
        *_host_lines(forecast),
        f"    step {_ms(times.step)} (limit: {times.limit}), MFU at most {times.mfu:.1%}, "
        f"{cost.images_per_second:,.0f} images/s",
        f"    {cost.steps:,} steps: {cost.hours:,.1f} h, {cost.chip_hours:,.0f} chip-hours{price}",
    ]


def _host_lines(forecast: Forecast) -> list[str]:
    host = forecast.host
    if host is None:
        return []
    return [
        f"    host time of a step on this machine: replayed {_ms(host.replayed)}, "
        f"traced {_ms(host.traced)} (runtime.replay=false)"
    ]


def _recomputed(forecast: Forecast) -> str:
    """Return the share of FLOPs that the traced step recomputes, as text."""
    if forecast.step is None:
        return ""
    extra = forecast.step.flops / (forecast.counts.step * forecast.case.batch) - 1
    return f", plus {extra:.0%} for recomputation" if extra > 0.02 else ""


def forecast_table(forecasts: Sequence[Forecast]) -> str:
    """Format several forecasts as a table, one line each."""
    header = (
        "slice", "batch", "fits", "HBM GiB", "sent/min", "accessed GB", "compute ms", "memory ms",
        "ici ms", "host ms", "MFU", "images/s", "hours", "chip-hours", "price", "compile s",
    )  # fmt: skip
    rows = [header] + [_row(forecast) for forecast in forecasts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(forecast: Forecast) -> tuple[str, ...]:
    step, times, cost = forecast.step, forecast.roofline, forecast.cost
    usable = step if step is not None and step.result.succeeded else None
    sent = _ratio(usable.bytes_sent, forecast.fsdp_minimum) if usable else "?"
    return (
        forecast.case.topology.accelerator,
        str(forecast.case.batch),
        {True: "yes", False: "no", None: "?"}[forecast.fits],
        f"{step.hbm_bytes / GIB:.2f}" if step and step.result.hbm_bytes else "?",
        sent.removesuffix(" x"),
        f"{usable.result.bytes_accessed / GB:.0f}" if usable else "?",
        f"{times.compute * 1e3:.0f}",
        f"{times.memory * 1e3:.0f}",
        f"{times.interconnect * 1e3:.0f}",
        f"{times.host * 1e3:.0f}" if forecast.host else "?",
        f"{times.mfu:.0%}",
        f"{cost.images_per_second:,.0f}",
        f"{cost.hours:,.0f}",
        f"{cost.chip_hours:,.0f}",
        "-" if cost.price is None else f"{cost.price:,.0f}",
        f"{step.result.seconds:.0f}" if step else "-",
    )


def forecast_json(forecast: Forecast, effort: str) -> dict[str, Any]:
    """Return a forecast as plain values: ``compiled`` from the compiler, ``model`` modelled."""
    case, counts = forecast.case, forecast.counts
    return {
        "topology": str(case.topology),
        "accelerator": case.topology.accelerator,
        "chips": case.topology.chips,
        "batch": case.batch,
        "mesh": str(case.mesh),
        "precision": case.config.runtime.precision,
        "compiled": None if forecast.step is None else _compiled_json(forecast, effort),
        "not_compiled": forecast.not_compiled or None,
        "model": {
            "arithmetic": asdict(counts),
            "state_bytes": forecast.state_bytes,
            "fsdp_minimum_bytes": forecast.fsdp_minimum,
            "host_seconds": None if forecast.host is None else asdict(forecast.host),
            "roofline_seconds": asdict(forecast.roofline)
            | {"step": forecast.roofline.step, "limit": forecast.roofline.limit},
            "cost": asdict(forecast.cost),
            "bill": asdict(forecast.cost),  # former name of `cost`, kept for one release
        },
        "assumed": forecast.notes,
    }


def _compiled_json(forecast: Forecast, effort: str) -> dict[str, Any]:
    step = forecast.step
    assert step is not None
    return {
        "effort": effort,
        "fits": forecast.fits,
        "compiled": asdict(step.result),
        "arguments": step.arguments,
        "idle_bytes": step.idle_bytes,
        "flops": step.flops,
        "phase": step.phase,
        "mesh": step.mesh,
        "hbm_bytes": step.hbm_bytes,
        "peak": None if step.peak is None else asdict(step.peak),
        "sent_bytes": step.bytes_sent,
        "sent_by_kind": bytes_sent_by_kind(step.collectives),
        "collectives": [
            {
                "kind": c.kind,
                "shapes": [f"{s.dtype}{list(s.dims)}" for s in c.shapes],
                "group": c.group_size,
                "times": c.count,
                "sent_bytes": c.bytes_sent,
                "source": c.source,
            }
            for c in step.collectives
        ],
        "faults": step.faults,
        "traffic": [
            {
                "operation": row.operation,
                "shapes": row.shapes,
                "source": row.source,
                "times": row.count,
                "num_bytes": row.num_bytes,
            }
            for row in step.traffic
        ],
        "unknown_loops": step.unknown_loops,
    }


def _ratio(value: float, minimum: float) -> str:
    return f"{value / minimum:.2f} x" if minimum else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
