"""Largest batch, accumulation and step time, from counts that are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rae_xla import load_config
from rae_xla.tools.plan.arithmetic import ModelCounts
from rae_xla.tools.plan.gpu.cards import GIB, Card, Cluster
from rae_xla.tools.plan.gpu.forecast import MemoryModel, make_gpu_case, make_gpu_forecast
from rae_xla.tools.plan.gpu.output import (
    gpu_forecast_json,
    gpu_forecast_table,
    gpu_forecast_text,
)
from rae_xla.tools.plan.gpu.step_count import SentBytes, StepCount, extrapolate
from rae_xla.tools.plan.gpu.timing import FAST, SLOW, step_time

CONFIG = Path(__file__).parents[4] / "configs/stage2/ditdh_s_256.yaml"
MODEL = ModelCounts(
    196_000_000, 195_000_000, 196_000_000, 10**8, 3e11, "flow matching", ((1, 1),), 392_000_000
)
# 100 TFLOP/s, 1 TB/s, and 21.25 GiB that a run can fill.
CARD = Card("test", "NVIDIA A100-SXM4-80GB", 22.25 / 0.95 * GIB, 1e12, 1e13, 1e11, 1e10)


def count(rows: int, fixed: float = 4 * GIB, per_image: float = GIB / 4, **values) -> StepCount:
    peak = int(fixed + per_image * rows)
    return replace(
        StepCount(rows, {"parameters": 1}, peak, {"parameters": peak}, 10**13, 0, 0, 0), **values
    )


def forecast(cluster: Cluster, *overrides: str, **values):
    config = load_config(CONFIG, overrides=["data.train=null", *overrides])
    case = make_gpu_case(config, cluster)
    counts = [count(rows, **values) for rows in case.rows_to_count]
    return make_gpu_forecast(case, MODEL, counts, steps=1000, price=2.0)


def test_the_largest_batch():
    model = MemoryModel.from_counts([count(1, per_image=9 * GIB), count(32), count(64)])
    assert (model.fixed, model.per_image) == (4 * GIB, GIB / 4)
    assert model.largest_rows(5 * GIB) == 4
    assert model.largest_rows(5 * GIB - 1) == 3
    assert model.largest_rows(3 * GIB) == 0


def test_a_batch_that_fits_with_accumulation():
    found = forecast(Cluster(CARD, 1))
    assert (found.case.batch, found.case.rows) == (1024, 1024)
    assert not found.fits
    assert found.largest_rows == 69
    assert found.accumulation == 16  # 64 images each, the largest divisor of 1,024 below 69
    text = gpu_forecast_text(found)
    assert "DOES NOT FIT" in text
    assert "fits with training.grad_accum_steps=16" in text
    fitting = forecast(Cluster(CARD, 1), "training.grad_accum_steps=16")
    assert fitting.fits
    assert fitting.case.rows == 64
    assert "21.25 GiB: fits" in gpu_forecast_text(fitting)


def test_a_model_that_does_not_fit_at_all():
    found = forecast(Cluster(CARD, 8), fixed=100 * GIB)
    assert (found.fits, found.largest_rows, found.accumulation) == (False, 0, None)
    text = gpu_forecast_text(found)
    assert "try runtime.precision=bf16, runtime.compile=true, runtime.remat=1" in text


def test_the_rows_that_are_counted():
    config = load_config(CONFIG, overrides=["data.train=null", "training.grad_accum_steps=4"])
    assert make_gpu_case(config, Cluster(CARD, 64)).rows_to_count == [4, 32, 64]
    assert make_gpu_case(config, Cluster(CARD, 1)).rows_to_count == [256, 512]


def test_names_of_groups():
    config = load_config(
        CONFIG, overrides=["data.train=null", "mesh.ici.data=4", "mesh.ici.fsdp=8"]
    )
    case = make_gpu_case(config, Cluster(CARD, 32))
    assert case.axis_of(range(8)) == "fsdp"
    assert case.axis_of([0, 8, 16, 24]) == "data"
    assert case.axis_of(range(32)) == "all"


def test_the_range_of_the_step_time():
    sent = [SentBytes("all-gather", list(range(8)), 2, 10**10)]
    step = count(8, flops=10**14, other_bytes=10**11, operations=1000, sent=sent)
    cluster = Cluster(CARD, 8)
    fast, slow = (
        step_time(step, cluster, assumed, bf16=True, compiled=True) for assumed in (FAST, SLOW)
    )
    products, other, links = 1e14 / 312e12, 0.1, 0.1
    assert fast.products == pytest.approx(products / 0.75)
    assert fast.step == pytest.approx(products / 0.75 + other / 4 / 0.9)
    assert slow.step == pytest.approx(products / 0.4 + other / 2 / 0.7 + links / 0.5)
    eager = step_time(step, cluster, SLOW, bf16=False, compiled=False)
    assert eager.products == pytest.approx(1e14 / 0.4 / 1e13)
    assert eager.launch == pytest.approx(0.015)
    many = replace(step, flops=0, other_bytes=0, sent=[], operations=10**6)
    host_bound = step_time(many, cluster, FAST, bf16=True, compiled=False)
    assert (host_bound.step, host_bound.limit) == (pytest.approx(5.0), "host")


def test_the_output_names_every_number():
    sent = [SentBytes("all-gather", list(range(8)), 2, 3 * 2**20)]
    values = {"flops": 4 * 10**13, "sent": sent, "phase": "flow matching"}
    found = forecast(Cluster(CARD, 8), "runtime.precision=bf16", "runtime.compile=true", **values)
    text = gpu_forecast_text(found)
    assert "fsdp: all-gather sends 3 MiB in 2 operations, 8 GPUs at 100 GB/s" in text
    assert "4.00 GiB and 256.0 MiB for each image of a micro-batch: at most 69 images" in text
    content = gpu_forecast_json(found)
    assert content["memory"]["largest_rows"] == 69
    fast = content["model"]["fast"]
    assert fast["gpu_hours"] == pytest.approx(8 * fast["hours"])
    assert fast["price"] == pytest.approx(2 * fast["gpu_hours"])
    assert 0 < content["model"]["slow"]["mfu"] < fast["mfu"] < 1
    table = gpu_forecast_table([found, found]).splitlines()
    assert len(table) == 3
    assert len({len(line) for line in table}) == 1


def test_further_micro_batches_add_the_same():
    def step(number: int) -> StepCount:
        """A step whose first micro-batch differs from the others."""
        peak = 1000 + 20 * number
        return replace(
            StepCount(
                8, {"batch": 20 * number}, peak, {"batch": 20 * number, "x": 1000}, 7 * number + 1,
                5 * number, 3 * number, 11 * number + 2,
            ),
            sent=[
                SentBytes("all-gather", [0, 1], 2 * number, 16 * number),
                SentBytes("all-reduce", [0, 1], 1, 4),
            ],
        )  # fmt: skip

    assert extrapolate(step(2), step(3), 61) == step(64)
