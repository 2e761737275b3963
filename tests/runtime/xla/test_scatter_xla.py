"""Reduce-scatters in several stages: groups, and values on devices."""

import pytest
import torch

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.runtime import start
from rae_xla.runtime.sharding import Placement
from rae_xla.runtime.xla import compat, spmd_mesh
from rae_xla.runtime.xla.linear import ShardedLinear

pytestmark = pytest.mark.xla


def scattered(values, stages):
    """Run the stages on one array per device, in the order of the devices."""
    values = dict(values)
    for groups in stages:
        results = {}
        for group in groups:
            total = sum(values[device] for device in group)
            results |= dict(zip(group, total.chunk(len(group)), strict=True))
        values = results
    return values


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [(1, [1]), (8, [8]), (12, [4, 3]), (13, [13]), (16, [4, 4]), (32, [8, 4]), (64, [8, 8]),
     (128, [8, 4, 4]), (256, [8, 8, 4])],
)  # fmt: skip
def test_stages_scatter_what_one_scatters(devices, sizes):
    # Two groups, of devices whose numbers have no order.
    numbers = torch.randperm(2 * devices, generator=torch.Generator().manual_seed(0)).tolist()
    groups = [numbers[:devices], numbers[devices:]]
    values = {number: torch.randint(100, (2 * devices,)) for number in numbers}
    stages = spmd_mesh.scatter_stages(groups)
    assert [len(stage[0]) for stage in stages] == sizes
    expected, found = scattered(values, [groups]), scattered(values, stages)
    for number in numbers:
        torch.testing.assert_close(found[number], expected[number], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("parts", "features", "width"),
    [(1, 64, 72), (1, 128, 72), (2, 48, 24), (2, 144, 128)],
    ids=["one matrix", "one padded", "two transposed", "two transposed and padded"],
)
def test_gradients_of_two_stages_equal_those_of_plain_torch(monkeypatch, parts, features, width):
    monkeypatch.setattr(spmd_mesh, "MAX_SCATTER_GROUP", 2)
    backend = start(RuntimeConfig(backend="xla", devices=4), MeshConfig())
    mesh = spmd_mesh.SpmdMesh.current()
    stored = (None, "fsdp") if parts > 1 else ("fsdp", None)
    layer = ShardedLinear(mesh, Placement(stored, (None, None)), parts)
    x, weight = torch.randn(8, 24, width), torch.randn(features, width)
    factor = torch.randn(8, 24, features)
    leaf = weight.clone().requires_grad_()
    (torch.nn.functional.linear(x, leaf) * factor).sum().backward()
    placed = backend.shard_batch({"x": x, "factor": factor})
    on_devices = backend.send(weight, stored).detach().requires_grad_()
    outputs = torch.cat(layer(placed["x"], on_devices, None), dim=-1)
    (outputs * placed["factor"]).sum().backward()
    # two stages for each matrix
    assert compat.graph_hlo_text([on_devices.grad]).count(" reduce-scatter(") == 2 * parts
    found = backend.to_host({"gradient": on_devices.grad})["gradient"]
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-4)
