"""Selection of tokens on several devices: the numbers of the CPU."""

import pytest
import torch

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.ops.gather import gather_tokens
from rae_xla.runtime import start

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def backend():
    return start(RuntimeConfig(backend="xla", devices=4), MeshConfig())


@pytest.mark.parametrize("rows", [8, 6], ids=["local rows", "rows that do not divide"])
def test_values_and_gradients_equal_those_of_the_cpu(backend, rows):
    values = torch.randn(rows, 5, 3)
    index = torch.randint(5, (rows, 7))
    weight = torch.randn(rows, 7, 3)
    leaf = values.clone().requires_grad_()
    expected = gather_tokens(leaf, index)
    (expected * weight).sum().backward()
    placed = backend.shard_batch({"v": values, "i": index, "w": weight}) if rows == 8 else {
        name: backend.send(tensor, ()) for name, tensor in
        {"v": values, "i": index, "w": weight}.items()
    }  # fmt: skip
    on_devices = placed["v"].detach().requires_grad_()
    found = gather_tokens(on_devices, placed["i"])
    (found * placed["w"]).sum().backward()
    result = backend.to_host({"found": found.detach(), "gradient": on_devices.grad})
    torch.testing.assert_close(result["found"], expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(result["gradient"], leaf.grad)
