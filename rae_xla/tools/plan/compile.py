"""Ahead-of-time compilation of a traced step with libtpu's compiler, without a TPU.

It runs as a separate process (``python -m rae_xla.tools.plan.compile JOB.json``), because libtpu
may abort the process and uses gigabytes. The result is a JSON file and the text of the compiled
module.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rae_xla.tools.plan.tpus import Topology, parse_topology
from rae_xla.tools.plan.worker import end_with_parent

EFFORT = {"full": None, "fast": -1.0}
"""``fast`` is a preview: the same collectives, a quarter of the time, up to 28% less memory."""

PINNED = {"torch_xla": "2.9.0", "jax": "0.7.1", "jaxlib": "0.7.1", "libtpu": "0.0.21"}
"""Versions that torch_xla 2.9.0 pins, so that the compiler is that of a real run.

Tracing and compilation use private APIs of these packages; other versions are rejected.
"""

_HBM = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class CompileJob:
    """Input of the compiling process.

    Attributes:
        step: path of the traced step, without a suffix (``trace.TraceJob.out``).
        topology: name of the topology.
        effort: key of ``EFFORT``.
        out: path of the result, without a suffix.
    """

    step: str
    topology: str
    effort: str
    out: str


@dataclass
class CompileResult:
    """Output of the compiling process: the compiler's numbers for one chip.

    Attributes:
        seconds: of compilation.
        failure: error message of the compiler; empty if it succeeded.
        required_hbm: bytes that the program needs, if it failed because they exceed the memory.
        arguments, outputs, aliased, temporaries, code: bytes of HBM.
        bytes_accessed: XLA's count of bytes read and written, on-chip memory included.
        versions: of the packages used.
    """

    seconds: float = 0.0
    failure: str = ""
    required_hbm: float = 0.0
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    bytes_accessed: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hbm_bytes(self) -> float:
        """Peak bytes of HBM."""
        if self.required_hbm:
            return self.required_hbm
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def succeeded(self) -> bool:
        """Whether the compiler produced a program."""
        return not self.failure


def why_no_compiler() -> str | None:
    """Return why this host cannot compile for a TPU, or None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"libtpu runs on Linux x86-64, this is {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):
        return f"jax {PINNED['jax']} needs Python 3.11 or 3.12, this is {platform.python_version()}"
    for name, wanted in PINNED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            return f"{name} is not installed (pip install 'rae-xla[xla,plan]')"
        if found.split("+")[0] != wanted:
            return f"{name} is {found}, but the plan supports only {wanted}"
    return None


def libtpu_flags(topology: Topology) -> list[str]:
    """Return the libtpu flags that torch_xla sets on a host with TPUs."""
    flags = [
        "--xla_tpu_use_enhanced_launch_barrier=false",
        "--xla_latency_hiding_scheduler_rerun=1",
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        "--xla_tpu_enable_flash_attention=false",
    ]
    if topology.generation.name.startswith("v5"):
        flags.append("--xla_enable_async_all_gather=true")
        flags.append("--xla_enable_async_collective_permute=true")
    return flags


def set_environment(topology: Topology) -> None:
    """Configure libtpu to compile on a host without this TPU."""
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


def topology_devices(topology: Topology) -> list[Any]:
    """Return the abstract devices of a topology, ordered by id."""
    from jax.experimental import topologies

    options: dict[str, Any] = dict(topology.generation.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if all(size == 1 for size in topology.shape):
        options["chips_per_host_bounds"] = (1,) * max(3, len(topology.shape))
    shape = "x".join(map(str, topology.shape))
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.generation.name}:{shape}", **options
    )
    return sorted(found.devices, key=lambda device: device.id)


def compile_step(job: CompileJob) -> CompileResult:
    """Compile a step, and write the text of the compiled module to ``job.out + ".hlo"``."""
    topology = parse_topology(job.topology)
    set_environment(topology)

    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jaxlib import _jax

    devices = topology_devices(topology)
    arguments = json.loads(Path(job.step + ".json").read_text())["arguments"]
    computation = xla_client.XlaComputation(Path(job.step + ".pb").read_bytes())
    text = _jax.mlir.xla_computation_to_mlir_module(computation)
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        _mark_arguments(ir, module, arguments, len(devices))
        bytecode = mlir.module_to_bytecode(module)

    # The options that torch_xla's client sets for an SPMD program.
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

    result = CompileResult(versions=PINNED)
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
            result.required_hbm = float(used[1]) * _UNITS[used[2]]
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
    """Annotate arguments with sharding and buffer donation, as torch_xla does for a real step."""
    main = next(
        op
        for op in module.body.operations
        if "sym_name" in op.attributes and ir.StringAttr(op.attributes["sym_name"]).value == "main"
    )
    count = len(main.arguments)
    if count != len(arguments):
        raise ValueError(
            f"the HLO has {count} parameters, but {len(arguments)} arguments are recorded"
        )
    given = (
        list(ir.ArrayAttr(main.attributes["arg_attrs"])) if "arg_attrs" in main.attributes else []
    )
    annotated = []
    for i, argument in enumerate(arguments):
        attributes = {a.name: a.attr for a in ir.DictAttr(given[i])} if given else {}
        if argument["sharding"]:
            attributes["mhlo.sharding"] = ir.StringAttr.get(argument["sharding"])
        if argument["donated"]:
            attributes["jax.buffer_donor"] = ir.BoolAttr.get(True)
        annotated.append(ir.DictAttr.get(attributes))
    main.attributes["arg_attrs"] = ir.ArrayAttr.get(annotated)
    int32 = ir.IntegerType.get_signless(32)
    module.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(int32, chips)
    module.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(int32, 1)
    module.operation.verify()


def main(path: str) -> None:
    """Compile the step that the job file describes, and write the result."""
    end_with_parent()
    job = CompileJob(**json.loads(Path(path).read_text()))
    Path(job.out + ".json").write_text(json.dumps(asdict(compile_step(job))))


if __name__ == "__main__":
    main(sys.argv[1])
