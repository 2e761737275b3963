"""The order of the devices of pods, as libtpu's topologies give it."""

import json
import subprocess
import sys

import pytest
from pod_topologies import OWNERS

from rae_xla.runtime.mesh import MeshShape
from rae_xla.tools.plan.compile import why_no_compiler

NO_COMPILER = pytest.mark.skipif(why_no_compiler() is not None, reason=f"{why_no_compiler()}")

pytestmark = [pytest.mark.xla, pytest.mark.nightly, NO_COMPILER]

# libtpu can describe one topology per process.
DESCRIBE = """
import json, sys
from rae_xla.tools.plan.compile import set_environment, topology_devices
from rae_xla.tools.plan.tpus import parse_topology

topology = parse_topology(sys.argv[1])
set_environment(topology)
devices = topology_devices(topology)
print(json.dumps([{"id": d.id, "process": d.process_index, "coords": list(d.coords),
                   "slice_index": getattr(d, "slice_index", None)} for d in devices]))
"""


def describe(topology):
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE, topology], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", OWNERS)
def test_the_recorded_owners_are_those_of_libtpu(topology):
    assert tuple(device["process"] for device in describe(topology)) == OWNERS[topology]


def test_a_hybrid_mesh_keeps_a_replica_within_a_slice(monkeypatch):
    from torch_xla.distributed.spmd import xla_sharding

    from rae_xla.runtime.xla import device_mesh

    devices = describe("2*v5e:4x4")
    attributes = [
        {"name": f"TPU:{d['id']}", "coords": d["coords"], "slice_index": d["slice_index"]}
        for d in devices
    ]
    # Both modules use the functions of torch_xla.runtime.
    runtime = device_mesh.xr
    monkeypatch.setattr(runtime, "global_runtime_device_attributes", lambda: list(attributes))
    monkeypatch.setattr(runtime, "global_runtime_device_count", lambda: len(devices))
    monkeypatch.setattr(xla_sharding.xm, "xla_device_hw", lambda device: "TPU")
    owners = [device["process"] for device in devices]
    mesh = device_mesh.make_device_mesh(MeshShape(data=1, fsdp=16, slices=2), owners)
    assert device_mesh.slice_count() == 2
    for replica in mesh.get_logical_mesh():
        assert len({attributes[device]["slice_index"] for device in replica}) == 1
        in_order = [owners[device] for device in replica]
        assert in_order != sorted(in_order), "the devices of a host are not consecutive"
    shared = device_mesh.make_device_mesh(MeshShape(data=1, fsdp=8, tensor=2, slices=2), owners)
    for group in shared.get_logical_mesh().reshape(-1, 2):
        assert len({owners[device] for device in group}) == 1
