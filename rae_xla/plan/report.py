"""A plan for people and for programs. Facts of the compiler and what is modelled stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rae_xla.plan.collectives import sent_by_kind
from rae_xla.plan.facts import Facts
from rae_xla.plan.forecast import Forecast

MIB, GIB, GB = 2**20, 2**30, 1e9
_SHOWN = 5


def text_report(plan: Forecast, effort: str) -> str:
    """The plan of one case, some twenty lines."""
    case, topology = plan.case, plan.case.topology
    lines = [
        f"{topology.accelerator} ({topology}, {topology.chips} chips), {case.batch} images a step, "
        f"mesh {case.mesh}, {case.config.runtime.precision}",
    ]
    if plan.facts is not None:
        lines += _compiled(plan, plan.facts, effort)
    if plan.reason:
        lines.append(f"  NOT COMPILED: {plan.reason}")
    lines += _model(plan)
    return "\n".join(lines + [f"  assumed: {note}" for note in plan.notes])


def _compiled(plan: Forecast, facts: Facts, effort: str) -> list[str]:
    compiled, chip = facts.compiled, plan.case.topology.chip
    versions = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    lines = [
        f"  compiled in {compiled.seconds:.0f} s, effort {effort} ({versions})",
        f"    step: {facts.phase}",
        f"    HBM per chip  {facts.hbm / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB: "
        + ("fits" if fits(plan) else "DOES NOT FIT"),
        "      " + ", ".join(_sizes(facts)),
    ]
    if facts.peak is not None:
        kinds = sorted(facts.peak.by_kind.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds)
        lines.append(f"      the temporaries at their fullest, by our reading: {shares} GiB")
    if not compiled.fits:
        return lines
    lines.append(
        f"    sent per chip {facts.sent / MIB:,.0f} MiB = {_ratio(facts.sent, plan.minimum)} "
        f"(FSDP minimum {plan.minimum / MIB:,.0f} MiB)"
    )
    for kind, sent in sorted(sent_by_kind(facts.collectives).items(), key=lambda item: -item[1]):
        of_kind = [c for c in facts.collectives if c.kind == kind]
        types = "+".join(dict.fromkeys(c.dtypes for c in of_kind if c.sent > MIB)) or "small"
        count = sum(c.times for c in of_kind)
        lines.append(f"      {kind:<18} {sent / MIB:9,.0f} MiB in {count:5d}  {types}")
    lines += [f"      FAULT: {fault}" for fault in facts.faults]
    lines.append(
        f"    bytes accessed {compiled.bytes_accessed / GB:.0f} GB (XLA's count: loops once, and "
        f"on-chip memory too); {facts.moved / GB:.0f} GB with loops, by our reading"
    )
    if facts.unknown_loops:
        lines.append(f"      loops of unknown length, counted once: {len(facts.unknown_loops)}")
    return lines


def _sizes(facts: Facts) -> list[str]:
    compiled = facts.compiled
    named = {kind: size for kind, size in facts.arguments.items() if size >= MIB}
    if compiled.fits:
        named["padding and small inputs"] = compiled.arguments - sum(named.values())
        named["new outputs"] = compiled.outputs - compiled.aliased
        named["temporaries (activations, gradients, gathered weights)"] = compiled.temporaries
        named["program"] = compiled.code
    named["held besides"] = facts.held
    return [f"{name} {size / GIB:.2f}" for name, size in named.items() if size >= MIB]


def fits(plan: Forecast) -> bool | None:
    """Whether the run fits the chip: by the compiler, or None where there is no such fact."""
    facts = plan.facts
    if facts is None or (facts.compiled.failure and not facts.compiled.used_hbm):
        return None
    return facts.compiled.fits and facts.hbm <= plan.case.topology.chip.hbm_bytes


def _model(plan: Forecast) -> list[str]:
    times, cost, counted = plan.roofline, plan.bill, plan.arithmetic
    state = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in plan.state.items())
    source = (
        "of the compiled step" if plan.facts and plan.facts.compiled.fits else "by arithmetic alone"
    )
    price = "" if cost.price is None else f", {cost.price:,.0f} at the given price"
    slices = f", network {_ms(times.network)}" if plan.case.mesh.slices > 1 else ""
    return [
        "  modelled (roofline: each resource at its peak; the memory's is good to a factor of 2)",
        f"    {counted.trained / 1e6:,.1f} M parameters trained, {counted.frozen / 1e6:,.1f} M "
        f"frozen; evenly split GiB per chip: {state}",
        f"    {counted.step / 1e9:,.0f} GFLOP per image, "
        f"{counted.step * plan.case.batch / 1e12:,.1f} TFLOP per step" + _again(plan),
        f"    time {source}: compute {_ms(times.compute)}, memory {_ms(times.memory)}, "
        f"interconnect {_ms(times.interconnect)}{slices}",
        f"    step {_ms(times.step)} (limit: {times.limit}), MFU at most {times.mfu:.1%}, "
        f"{cost.images_per_second:,.0f} images/s",
        f"    {cost.steps:,} steps: {cost.hours:,.1f} h, {cost.chip_hours:,.0f} chip-hours{price}",
    ]


def _again(plan: Forecast) -> str:
    """What rematerialisation computes a second time, as far as the traced step tells."""
    if plan.facts is None:
        return ""
    model = plan.arithmetic.step * plan.case.batch
    extra = plan.facts.flops / model - 1
    return f", and {extra:.0%} computed again" if extra > 0.02 else ""


def text_table(plans: Sequence[Forecast]) -> str:
    """Several plans, one line each."""
    header = (
        "slice", "batch", "fits", "HBM GiB", "sent/min", "accessed GB", "compute ms", "memory ms",
        "ici ms", "MFU", "images/s", "hours", "chip-hours", "price", "compile s",
    )  # fmt: skip
    rows = [header] + [_row(plan) for plan in plans]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _row(plan: Forecast) -> tuple[str, ...]:
    facts, times, cost = plan.facts, plan.roofline, plan.bill
    good = facts if facts is not None and facts.compiled.fits else None
    fit = {True: "yes", False: "no", None: "?"}[fits(plan)]
    return (
        plan.case.topology.accelerator,
        str(plan.case.batch),
        fit,
        f"{facts.hbm / GIB:.2f}" if facts and facts.compiled.hbm else "?",
        _ratio(good.sent, plan.minimum).removesuffix(" x") if good else "?",
        f"{good.compiled.bytes_accessed / GB:.0f}" if good else "?",
        f"{times.compute * 1e3:.0f}",
        f"{times.memory * 1e3:.0f}",
        f"{times.interconnect * 1e3:.0f}",
        f"{times.mfu:.0%}",
        f"{cost.images_per_second:,.0f}",
        f"{cost.hours:,.0f}",
        f"{cost.chip_hours:,.0f}",
        "-" if cost.price is None else f"{cost.price:,.0f}",
        f"{facts.compiled.seconds:.0f}" if facts else "-",
    )


def as_json(plan: Forecast, effort: str) -> dict[str, Any]:
    """The plan of one case as plain values: ``compiled`` are facts, ``model`` is not."""
    case, facts = plan.case, plan.facts
    compiled = None
    if facts is not None:
        compiled = asdict(facts) | {
            "effort": effort,
            "fits": fits(plan),
            "hbm_bytes": facts.hbm,
            "sent_bytes": facts.sent,
            "sent_by_kind": sent_by_kind(facts.collectives),
        }
        compiled["collectives"] = [
            {
                "kind": c.kind,
                "shapes": [f"{s.dtype}{list(s.dims)}" for s in c.shapes],
                "group": c.group,
                "times": c.times,
                "sent_bytes": c.sent,
                "source": c.source,
            }
            for c in facts.collectives
        ]
    return {
        "topology": str(case.topology),
        "accelerator": case.topology.accelerator,
        "chips": case.topology.chips,
        "batch": case.batch,
        "mesh": str(case.mesh),
        "precision": case.config.runtime.precision,
        "compiled": compiled,
        "not_compiled": plan.reason or None,
        "model": {
            "arithmetic": asdict(plan.arithmetic),
            "state_bytes": plan.state,
            "fsdp_minimum_bytes": plan.minimum,
            "roofline_seconds": asdict(plan.roofline)
            | {"step": plan.roofline.step, "limit": plan.roofline.limit},
            "bill": asdict(plan.bill),
        },
        "assumed": plan.notes,
    }


def _ratio(value: float, minimum: float) -> str:
    return f"{value / minimum:.2f} x" if minimum else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
