"""Selection of tokens by their positions."""

import pytest
import torch

from rae_xla.ops.gather import gather_tokens


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_every_row_has_its_own_positions(trailing):
    values = torch.randn(2, 5, *trailing)
    index = torch.tensor([[4, 0, 4], [1, 2, 3]])
    found = gather_tokens(values, index)
    assert found.shape == (2, 3, *trailing)
    for row in range(2):
        assert torch.equal(found[row], values[row, index[row]])
