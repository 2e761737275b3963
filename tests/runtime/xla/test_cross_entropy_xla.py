"""Cross-entropy on several devices: the numbers of the CPU, and one collective of each kind."""

import re

import pytest
import torch

from rae_xla.config import MeshConfig, RuntimeConfig
from rae_xla.ops.cross_entropy import IGNORE, cross_entropy
from rae_xla.runtime import start
from rae_xla.runtime.xla import compat

pytestmark = pytest.mark.xla


@pytest.mark.parametrize(
    ("rows", "width"), [(8, 16), (6, 16), (8, 6)], ids=["local", "uneven rows", "uneven columns"]
)
def test_losses_and_gradients_equal_those_of_the_cpu(rows, width):
    backend = start(RuntimeConfig(backend="xla", devices=4), MeshConfig())
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 10, width), torch.randn(33, width)
    targets = torch.randint(33, (rows, 10)).masked_fill(torch.rand(rows, 10) < 0.3, IGNORE)
    scale = torch.rand(rows)

    def losses(hidden, weight, targets, scale):
        sums, matches = cross_entropy(hidden, weight, targets, chunk=4)
        (sums * scale).sum().backward()
        return sums.detach(), matches

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    expected = [*losses(*leaves, targets, scale), *(leaf.grad for leaf in leaves)]
    split = "fsdp" if rows % 4 == 0 else None
    places = {
        "hidden": (hidden, (split,)),
        "targets": (targets, (split,)),
        "scale": (scale, (split,)),
    }
    placed = {name: backend.send(tensor, spec) for name, (tensor, spec) in places.items()}
    hidden = placed["hidden"].detach().requires_grad_()
    weight = (
        backend.send(weight, (None, "fsdp") if width % 4 == 0 else ()).detach().requires_grad_()
    )
    found = [*losses(hidden, weight, placed["targets"], placed["scale"]), hidden.grad, weight.grad]
    text = compat.graph_hlo_text(found)
    scatters = len(re.findall(r" reduce-scatter\(", text))
    assert scatters == (1 if (rows, width) == (8, 16) else 0)
    result = backend.to_host({str(i): tensor for i, tensor in enumerate(found)})
    torch.testing.assert_close(list(result.values()), expected, rtol=1e-5, atol=1e-5)
