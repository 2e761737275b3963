import pytest

from rae_xla.runtime.mesh import resolve_mesh
from rae_xla.runtime.sharding import FSDP_RULES, partition_spec


@pytest.mark.parametrize(
    ("data", "fsdp", "devices", "shape"),
    [(1, -1, 4, (1, 4)), (-1, 2, 4, (2, 2)), (2, 2, 4, (2, 2)), (1, -1, 1, (1, 1))],
)
def test_a_mesh_covers_every_device(data, fsdp, devices, shape):
    mesh = resolve_mesh(data, fsdp, devices)
    assert (mesh.data, mesh.fsdp) == shape
    assert mesh.size == devices


@pytest.mark.parametrize(("data", "fsdp"), [(1, 3), (3, -1), (-1, -1), (0, 4), (2, 4)])
def test_a_mesh_that_does_not_is_refused(data, fsdp):
    with pytest.raises(ValueError, match="mesh"):
        resolve_mesh(data, fsdp, 4)


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("blocks.0.attn.qkv.weight", (192, 64), ("fsdp", None)),
        ("y_embedder.embedding_table.weight", (11, 64), (None, "fsdp")),
        ("x_embedder.proj.weight", (64, 3, 1, 1), ("fsdp", None, None, None)),
        ("blocks.0.attn.qkv.bias", (192,), (None,)),
        ("final_layer.linear.weight", (3, 5), (None, None)),
        ("step", (), ()),
    ],
)
def test_matrices_are_split_where_they_divide_and_vectors_stay_whole(name, shape, spec):
    assert partition_spec(name, shape, FSDP_RULES, {"data": 2, "fsdp": 4}) == spec
