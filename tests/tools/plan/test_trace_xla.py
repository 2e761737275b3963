"""The traced step equals the one that training runs: same operations, same donated buffers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch

from rae_xla import load_config
from rae_xla.tools.plan.hlo import Module, parse_module
from rae_xla.tools.plan.trace import TraceJob, host_batch, last_step
from rae_xla.tools.plan.worker import GB, Limits, run_module

pytestmark = pytest.mark.xla

CHIPS = 4


def operations(module: Module) -> Counter:
    """Count the opcodes of a module, without sharding annotations and plumbing."""
    found = Counter(i.opcode for c in module.computations.values() for i in c.values())
    for annotation in ("custom-call", "parameter", "get-tuple-element", "tuple"):
        del found[annotation]
    return found


def trace_in_worker(folder: Path, config: Path, out: Path) -> dict:
    job = TraceJob(str(config), "stage2", CHIPS, 1, tiny.BATCH, str(out))
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    limits = Limits(8 * GB, 600)
    run_module(
        "rae_xla.tools.plan.trace", str(path), limits, {"PJRT_DEVICE": "CPU"}, lambda *_: None
    )
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.slow
def test_the_traced_step_equals_the_real_one(tmp_path):
    import torch_xla
    import torch_xla.debug.metrics as met

    from rae_xla.checkpoint.train_state import make_state
    from rae_xla.runtime import start
    from rae_xla.runtime.xla import compat
    from rae_xla.train.tasks.diffusion import DiffusionTask

    file = tiny.make_configs(tmp_path, "no/such/shards")["stage2"]
    config = load_config(file, overrides=["runtime.backend=xla", "runtime.precision=bf16"])
    saved = tmp_path / "saved.yaml"
    config.save(saved)
    traced = trace_in_worker(tmp_path, saved, tmp_path / "step")

    # the real step, with weights, on the same number of devices
    backend = start(config.runtime, config.mesh, seed=config.training.global_seed)
    _, aliased_at_start = met.metric_data("InputOutputAliasCount")[:2]
    task = DiffusionTask(config, backend, None, 1000)
    state = make_state(task.model, backend)
    backend.place(task.frozen)
    number = last_step(config)
    host = host_batch(tiny.BATCH, tiny.SIZE, task, number)
    batch = backend.shard_batch({name: torch.zeros_like(tensor) for name, tensor in host.items()})
    torch_xla.sync()
    metrics = task.make_step(task.phase(number), state)(batch)
    updated = [*state.ema.parameters(), *state.model.parameters().values()]
    updated += state.model.optimizer_tensors().values()
    text = compat.graph_hlo_text([metrics, *updated])

    assert operations(parse_module(text)) == operations(_module(tmp_path / "step.pb"))
    donated = Counter(a["kind"] for a in traced["arguments"] if a["donated"])
    trained = len(state.model.parameters())
    assert donated["parameters"] == trained
    assert donated["optimizer"] == 2 * trained
    torch_xla.sync()
    _, aliased = met.metric_data("InputOutputAliasCount")[:2]
    assert aliased - aliased_at_start == sum(donated.values()) == len(updated)


def _module(path: Path) -> Module:
    xla_client = pytest.importorskip("jax._src.lib").xla_client
    computation = xla_client.XlaComputation(path.read_bytes())
    return parse_module(computation.get_hlo_module().to_string())
