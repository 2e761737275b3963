"""The traced step is the one that training runs: same operations, same buffers re-used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch

from rae_xla import load_config
from rae_xla.plan.hlo import Module, parse_module
from rae_xla.plan.trace import TraceJob, host_batch, last_step
from rae_xla.plan.worker import GB, Limits, run_module

pytestmark = pytest.mark.xla

CHIPS = 4


def operations(module: Module) -> Counter:
    """What is computed, without notes on how it is split."""
    found = Counter(i.opcode for c in module.computations.values() for i in c.values())
    for annotation in ("custom-call", "parameter", "get-tuple-element", "tuple"):
        del found[annotation]
    return found


def trace_abstractly(folder: Path, config: Path, out: Path) -> dict:
    job = TraceJob(str(config), "stage2", CHIPS, 1, tiny.BATCH, str(out))
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    limits = Limits(8 * GB, 600)
    run_module("rae_xla.plan.trace", str(path), limits, {"PJRT_DEVICE": "CPU"}, lambda *_: None)
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_it_is_the_step_that_training_runs(tmp_path):
    import torch_xla
    import torch_xla.debug.metrics as met

    from rae_xla.runtime import start
    from rae_xla.train.stage2 import Stage2
    from rae_xla.train.state import make_state

    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    config = load_config(file, overrides=["runtime.backend=xla", "runtime.precision=bf16"])
    saved = tmp_path / "saved.yaml"
    config.save(saved)
    traced = trace_abstractly(tmp_path, saved, tmp_path / "step")

    # the real one, with weights, on the same number of devices
    runtime = start(config.runtime, config.mesh, seed=config.training.global_seed)
    stage = Stage2(config, runtime, None, 1000)
    state = make_state(stage.model, runtime)
    runtime.place(stage.frozen)
    number = last_step(config)
    host = host_batch(tiny.BATCH, tiny.SIZE, stage, number)
    batch = runtime.put({name: torch.zeros_like(tensor) for name, tensor in host.items()})
    torch_xla.sync()
    figures = stage.make_step(stage.phase(number), state)(batch)
    changed = [*state.ema.parameters(), *state.model.parameters().values()]
    changed += state.model.optimizer_tensors().values()
    text = torch_xla._XLAC._get_xla_tensors_hlo([figures, *changed])

    assert operations(parse_module(text)) == operations(_module(tmp_path / "step.pb"))
    kinds = Counter(a["kind"] for a in traced["arguments"] if a["donated"])
    trained = len(state.model.parameters())
    assert kinds["parameters"] == trained
    assert kinds["optimizer"] == 2 * trained
    torch_xla.sync()
    _, aliased = met.metric_data("InputOutputAliasCount")[:2]
    assert aliased == sum(kinds.values()) == len(changed)


def _module(path: Path) -> Module:
    xla_client = pytest.importorskip("jax._src.lib").xla_client
    computation = xla_client.XlaComputation(path.read_bytes())
    return parse_module(computation.get_hlo_module().to_string())
