"""Meshes that fit the devices of a run, and meshes that do not."""

from types import SimpleNamespace

import pytest

from rae_xla.runtime.mesh import resolve_mesh


def settings(data=1, fsdp=-1, tensor=1, slices=1, across=1):
    ici = SimpleNamespace(data=data, fsdp=fsdp, tensor=tensor)
    return SimpleNamespace(ici=ici, dcn=SimpleNamespace(data=slices, fsdp=across), sharding=())


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ({}, 4, (1, 4, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, 4, (2, 2, 1, 1)),
        ({"tensor": 2}, 8, (1, 4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, 8, (2, 2, 2, 1)),
        ({"slices": 2}, 8, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "slices": 4}, 32, (2, 2, 2, 4)),
    ],
)
def test_a_mesh_covers_every_device(sizes, devices, shape):
    mesh = resolve_mesh(settings(**sizes), devices)
    assert (mesh.data, mesh.fsdp, mesh.tensor, mesh.slices) == shape
    assert mesh.size == devices
    assert mesh.batch_shards * mesh.tensor == devices
    assert list(mesh.axis_sizes) == ["data", "fsdp", "tensor"]
    assert mesh.axis_sizes["data"] == mesh.data * mesh.slices


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "does not match the 4 devices"),
        ({"data": 3}, "does not match"),
        ({"data": -1}, r"mesh\.ici\.data and mesh\.ici\.fsdp are both -1"),
        ({"data": 0, "fsdp": 4}, "does not match"),
        ({"data": 2, "fsdp": 4}, "does not match"),
        ({"tensor": 8}, "tensor=8"),
        ({"slices": 3}, r"3 slices \(mesh\.dcn\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        resolve_mesh(settings(**sizes), 4)


def test_a_state_can_be_sharded_over_slices():
    mesh = resolve_mesh(settings(slices=2, across=2), 16)
    assert (mesh.slices, mesh.fsdp, mesh.size, mesh.batch_shards) == (4, 4, 16, 16)
    assert mesh.axis_sizes == {"data": 2, "fsdp": 8, "tensor": 1}
    assert str(mesh) == "4 slices of data=1 x fsdp=4 (fsdp over 2 slices)"


def test_a_mesh_as_text():
    assert str(resolve_mesh(settings(), 4)) == "data=1 x fsdp=4"
    several_slices = resolve_mesh(settings(tensor=2, slices=2), 16)
    assert str(several_slices) == "2 slices of data=1 x fsdp=4 x tensor=2"
