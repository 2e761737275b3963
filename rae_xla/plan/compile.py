"""Compile a traced step for a TPU that is not here, with libtpu's own compiler.

Run as a process of its own (``python -m rae_xla.plan.compile JOB.json``): libtpu can end the
process it is in, and takes gigabytes. The result is a JSON file and the text of the compiled module
beside it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rae_xla.plan.chips import Topology, parse_topology
from rae_xla.plan.worker import end_with_parent

EFFORT = {"full": None, "fast": -1.0}
"""``fast`` is a preview: the same collectives, a quarter of the time, and up to 28% less memory."""

_HBM = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Job:
    """What is to be compiled for what.

    Attributes:
        step: path of the traced step, without endings (see ``trace``).
        topology: by name.
        effort: ``full`` or ``fast``.
        out: path of the result, without endings.
    """

    step: str
    topology: str
    effort: str
    out: str


@dataclass
class Compiled:
    """What the compiler says of one chip.

    Attributes:
        seconds: of compiling.
        failure: empty, or why it could not be compiled.
        used_hbm: bytes a program needs that does not fit, by the compiler.
        arguments, outputs, aliased, temporaries, code: bytes of HBM.
        bytes_accessed: XLA's count of bytes read and written, on-chip memory included.
    """

    seconds: float = 0.0
    failure: str = ""
    used_hbm: float = 0.0
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    bytes_accessed: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hbm(self) -> float:
        """Bytes of HBM that are in use at once."""
        if self.used_hbm:
            return self.used_hbm
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        """Whether the compiler made a program of it."""
        return not self.failure


def libtpu_flags(topology: Topology) -> list[str]:
    """The options torch_xla gives libtpu where it sees chips; here it sees none."""
    flags = [
        "--xla_tpu_use_enhanced_launch_barrier=false",
        "--xla_latency_hiding_scheduler_rerun=1",
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        "--xla_tpu_enable_flash_attention=false",
    ]
    if topology.chip.name.startswith("v5"):
        flags.append("--xla_enable_async_all_gather=true")
        flags.append("--xla_enable_async_collective_permute=true")
    return flags


def set_environment(topology: Topology) -> None:
    """Make libtpu work without a chip, on a machine that may have another one."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    named = {flag.split("=")[0] for flag in given}
    flags = [flag for flag in libtpu_flags(topology) if flag.split("=")[0] not in named]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags + given)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }


def describe(topology: Topology) -> list[Any]:
    """The devices of a topology, in the order of their numbers."""
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if all(size == 1 for size in topology.shape):
        options["chips_per_host_bounds"] = (1,) * max(3, len(topology.shape))
    shape = "x".join(map(str, topology.shape))
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **options
    )
    return sorted(found.devices, key=lambda device: device.id)


def compile_step(job: Job) -> Compiled:
    """Compile, and write the compiled module's text to ``job.out + ".hlo"``."""
    topology = parse_topology(job.topology)
    set_environment(topology)

    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jaxlib import _jax

    from rae_xla.plan.versions import PINNED

    devices = describe(topology)
    arguments = json.loads(Path(job.step + ".json").read_text())["arguments"]
    computation = xla_client.XlaComputation(Path(job.step + ".pb").read_bytes())
    text = _jax.mlir.xla_computation_to_mlir_module(computation)
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        _mark_arguments(ir, module, arguments, len(devices))
        bytecode = mlir.module_to_bytecode(module)

    # as torch_xla's own client asks for an SPMD program
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, len(devices)
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False
    build.allow_spmd_sharding_propagation_to_output = [True]
    build.allow_spmd_sharding_propagation_to_parameters = [False]
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.array([[device.id for device in devices]])
    )
    effort = EFFORT[job.effort]
    if effort is not None:
        build.exec_time_optimization_effort = effort
        build.memory_fitting_effort = effort

    result = Compiled(versions=PINNED)
    start = time.perf_counter()
    try:
        executable = devices[0].client.compile(
            bytecode, executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options,
        )  # fmt: skip
    except xla_client.XlaRuntimeError as error:
        result.seconds = time.perf_counter() - start
        result.failure = " ".join(str(error).split())[:2000]
        if (used := _HBM.search(result.failure)) is not None:
            result.used_hbm = float(used[1]) * _UNITS[used[2]]
        return result
    result.seconds = time.perf_counter() - start
    memory = executable.get_compiled_memory_stats()
    result.arguments = memory.argument_size_in_bytes
    result.outputs = memory.output_size_in_bytes
    result.aliased = memory.alias_size_in_bytes
    result.temporaries = memory.temp_size_in_bytes
    result.code = memory.generated_code_size_in_bytes
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    result.bytes_accessed = costs.get("bytes accessed", 0.0)
    Path(job.out + ".hlo").write_text(executable.hlo_modules()[0].to_string())
    return result


def _mark_arguments(ir: Any, module: Any, arguments: list[dict[str, Any]], chips: int) -> None:
    """Say how arguments are split, and which buffers an output may take over, as torch_xla does
    when it runs a step.
    """
    main = next(
        op
        for op in module.body.operations
        if "sym_name" in op.attributes and ir.StringAttr(op.attributes["sym_name"]).value == "main"
    )
    count = len(main.arguments)
    if count != len(arguments):
        raise ValueError(f"the step has {count} arguments, and its table {len(arguments)}")
    given = (
        list(ir.ArrayAttr(main.attributes["arg_attrs"])) if "arg_attrs" in main.attributes else []
    )
    marked = []
    for i, argument in enumerate(arguments):
        of_argument = {a.name: a.attr for a in ir.DictAttr(given[i])} if given else {}
        if argument["sharding"]:
            of_argument["mhlo.sharding"] = ir.StringAttr.get(argument["sharding"])
        if argument["donated"]:
            of_argument["jax.buffer_donor"] = ir.BoolAttr.get(True)
        marked.append(ir.DictAttr.get(of_argument))
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(marked)
    whole = ir.IntegerType.get_signless(32)
    module.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(whole, chips)
    module.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(whole, 1)
    module.operation.verify()


def main(path: str) -> None:
    """The process: read a job, write its result."""
    end_with_parent()
    job = Job(**json.loads(Path(path).read_text()))
    Path(job.out + ".json").write_text(json.dumps(asdict(compile_step(job))))


if __name__ == "__main__":
    main(sys.argv[1])
