"""Names and tensors of stacked blocks."""

import pytest
import torch
from torch import nn

from rae_xla.runtime.blocks import (
    evenly_spread,
    stack,
    stacked_name,
    unstack,
    unstack_snapshot,
    unstacked_names,
)
from rae_xla.runtime.snapshot import HostShard, HostTensor


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.0, []), (0.5, [1, 3]), (0.25, [3]), (1.0, [0, 1, 2, 3])]
)
def test_a_share_of_the_blocks_is_evenly_spread(share, chosen):
    blocks = [nn.Identity() for _ in range(4)]
    assert evenly_spread(blocks, share) == [blocks[i] for i in chosen]
    assert evenly_spread([], share) == []


def test_a_stacked_name_covers_the_names_of_its_blocks():
    assert stacked_name(2, 5) == "2:5"
    assert unstacked_names("ema/blocks.2:5.w3.weight/exp_avg") == [
        f"ema/blocks.{i}.w3.weight/exp_avg" for i in (2, 3, 4)
    ]
    assert unstacked_names("0:2") == ["0", "1"]
    assert unstacked_names("blocks.2.mlp.w12.weight") == ["blocks.2.mlp.w12.weight"]


def test_unstack_is_the_inverse_of_stack():
    blocks = {f"blocks.{i}.w": torch.randn(2, 3) for i in range(4)} | {"b": torch.randn(2)}
    stacked = stack(blocks, ["blocks.0:3.w", "blocks.3.w", "b"])
    assert {name: tuple(t.shape) for name, t in stacked.items()} == {
        "blocks.0:3.w": (3, 2, 3), "blocks.3.w": (2, 3), "b": (2,),
    }  # fmt: skip
    unstacked = unstack(stacked)
    assert list(unstacked) == list(blocks)
    assert all(torch.equal(unstacked[name], t) for name, t in blocks.items())


def test_a_missing_block_is_named():
    with pytest.raises(KeyError, match=r"blocks\.1\.w"):
        stack({"blocks.0.w": torch.zeros(1)}, ["blocks.0:2.w"])


def test_a_snapshot_is_unstacked_shard_by_shard():
    """Two row shards of three stacked blocks."""
    full = torch.arange(24.0).reshape(3, 4, 2)
    shards = tuple(HostShard(full[:, at : at + 2], (0, at, 0)) for at in (2, 0))
    blocks = unstack_snapshot({"m/blocks.5:8.w": HostTensor((3, 4, 2), shards)})
    assert list(blocks) == [f"m/blocks.{i}.w" for i in (5, 6, 7)]
    for expected, block in zip(full, blocks.values(), strict=True):
        assert block.shape == (4, 2)
        assert [shard.offsets for shard in block.shards] == [(2, 0), (0, 0)]
        assert torch.equal(block.shards[0].data, expected[2:])
        assert torch.equal(block.shards[1].data, expected[:2])
