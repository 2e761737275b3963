"""What several TPU hosts do besides computing, on the four virtual devices of one process."""

import numpy as np
import pytest
import torch
from pod_topologies import OWNERS

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.config.schema import IciMesh
from rae_xla.errors import UserError
from rae_xla.evaluate.feature_networks import FeatureModule, FeatureNetwork
from rae_xla.runtime import start
from rae_xla.runtime.mesh import MeshShape

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def backend():
    """Devices that share rows in pairs."""
    mesh = MeshConfig(IciMesh(data=2, fsdp=1, tensor=2))
    return start(RuntimeConfig(backend="xla", devices=4), mesh)


@pytest.fixture
def several_hosts(backend, monkeypatch):
    """Make the backend gather as one of several processes does."""
    monkeypatch.setattr(backend, "process_count", 2)
    monkeypatch.setattr(backend, "send", lambda t, spec, rows: send(backend, t, spec))
    return backend


def send(backend, rows, spec):
    from rae_xla.runtime.xla.compat import local_device_numbers
    from rae_xla.runtime.xla.device_mesh import RowTransfer

    return RowTransfer(backend.device_mesh, backend.mesh, local_device_numbers()).send(rows, spec)


def test_gathering_compiles_once_for_all_tensors_of_a_shape(several_hosts):
    host = [{"x": torch.randn(8, 6), "n": torch.randn(8)} for _ in range(4)]
    placed = [several_hosts.shard_batch(batch) for batch in host]
    several_hosts.synchronize()
    before = several_hosts.compilations()
    for batch, expected in zip(placed, host, strict=True):
        found = several_hosts.to_host(batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert several_hosts.compilations() == before + 1


def test_large_tensors_are_gathered_one_after_the_other(several_hosts, monkeypatch):
    from rae_xla.runtime.xla import host_copies

    monkeypatch.setattr(host_copies, "MAX_GATHERED_BYTES", 8 * 6 * 4)
    host = {name: torch.randn(8, 6) for name in "abc"}
    placed = several_hosts.shard_batch(host)
    several_hosts.synchronize()
    before = several_hosts.compilations()
    found = several_hosts.to_host(placed)
    assert all(torch.equal(found[name], host[name]) for name in host)
    assert several_hosts.compilations() == before + 1  # three equal programs


def test_rows_that_several_devices_share_arrive_in_order(backend):
    from rae_xla.runtime.xla import compat

    rows = torch.arange(24).reshape(8, 3)
    expected = backend.shard_batch({"x": rows})["x"]
    found = send(backend, rows, ("data", None))
    assert compat.sharding_text(found) == compat.sharding_text(expected)
    assert torch.equal(found.cpu(), rows)
    for shards, others in zip(*(compat.device_shards([t]) for t in (found, expected)), strict=True):
        for one, other in zip(shards, others, strict=True):
            assert torch.equal(one.data, other.data)
            assert (one.device, one.index) == (other.device, other.index)


def test_the_rows_of_a_process_go_to_its_own_devices(backend):
    """As the second of two processes, each with two of the devices."""
    from rae_xla.runtime.xla.device_mesh import RowTransfer, make_device_mesh

    shape = MeshShape(data=2, fsdp=1, tensor=2)
    mesh = make_device_mesh(shape, owners=(0, 1, 0, 1))
    assert mesh.get_logical_mesh().reshape(2, 2).tolist() == [[0, 2], [1, 3]]
    transfer = RowTransfer(mesh, shape, local_devices=(1, 3))
    assert (transfer._parts, transfer._own, transfer._all) == ([0, 0], 1, 2)


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_devices_of_a_tensor_group_are_on_one_host(monkeypatch, tensor):
    from rae_xla.runtime.xla import device_mesh

    owners = OWNERS["v5e:4x4"]
    monkeypatch.setattr(device_mesh.xr, "global_runtime_device_count", lambda: len(owners))
    shape = MeshShape(data=1, fsdp=16 // tensor, tensor=tensor)
    mesh = device_mesh.make_device_mesh(shape, owners)
    for group in mesh.get_logical_mesh().reshape(-1, tensor):
        assert len({owners[device] for device in group}) == 1
    with pytest.raises(UserError, match=r"mesh\.ici\.tensor=8"):
        device_mesh.make_device_mesh(MeshShape(data=1, fsdp=2, tensor=8), owners)


def test_without_a_tensor_axis_devices_keep_their_order(monkeypatch):
    from rae_xla.runtime.xla import device_mesh

    monkeypatch.setattr(device_mesh.xr, "global_runtime_device_count", lambda: 16)
    mesh = device_mesh.make_device_mesh(MeshShape(data=1, fsdp=16), OWNERS["v5e:4x4"])
    assert np.array_equal(mesh.get_logical_mesh(), np.arange(16))


class Product(FeatureModule):
    """A matrix product, whose lowering names its precision."""

    def __init__(self):
        super().__init__()
        self.source = "random"
        self.register_buffer("weight", torch.randn(12, 4))

    def forward(self, pixels):
        return {"pool": pixels.flatten(1).float() @ self.weight}


def test_features_are_float32_in_a_run_of_another_precision(backend, monkeypatch):
    from rae_xla.runtime.xla import compat

    text = []

    def compile_and_read(function):
        def call(*inputs):
            outputs = function(*inputs)
            text.append(compat.graph_hlo_text(list(outputs.values())))
            return outputs

        return call

    monkeypatch.setattr(backend, "compile", compile_and_read)
    with compat.matmul_precision("default"):  # as runtime.precision=bf16 leaves it
        network = FeatureNetwork(Product(), backend)
        chunk = backend.shard_batch({"x": torch.zeros(4, 3, 2, 2, dtype=torch.uint8)})["x"]
        network(chunk)
        outside = compat.graph_hlo_text([chunk.flatten(1).float() @ torch.ones(12, 4).to("xla")])
    assert "operand_precision={highest,highest}" in text[0]
    assert "operand_precision={highest,highest}" not in outside


def test_the_start_line_names_the_attention(backend):
    assert backend.description.endswith("fp32, plain attention")
    from rae_xla.runtime.xla import flash_attention

    describe = flash_attention.describe_attention
    assert describe("plain", "bf16", tpu=True) == "plain attention"
    assert describe("auto", "fp32", tpu=True).startswith("plain attention (flash attention: its")


def test_the_start_line_says_why_a_stock_tpu_vm_has_no_flash_attention(monkeypatch):
    from rae_xla.runtime.xla import flash_attention

    monkeypatch.setattr(flash_attention, "installed_version", lambda name: None)
    monkeypatch.setattr(flash_attention.sys, "version_info", (3, 10, 12))
    found = flash_attention.describe_attention("auto", "bf16", tpu=True)
    assert "kernels need jax 0.7.1, not none" in found
    assert "remove .venv and run install_spmd.sh again" in found
