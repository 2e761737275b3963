import pytest
import torch

from rae_xla.runtime.snapshot import HostShard, HostTensor
from rae_xla.runtime.stacked import cut_snapshot, cut_up, names_in, put_together, row_name


def test_a_name_stands_for_those_of_its_row():
    assert row_name(2, 5) == "2:5"
    assert names_in("ema/blocks.2:5.w3.weight/exp_avg") == [
        f"ema/blocks.{i}.w3.weight/exp_avg" for i in (2, 3, 4)
    ]
    assert names_in("0:2") == ["0", "1"]
    assert names_in("blocks.2.mlp.w12.weight") == ["blocks.2.mlp.w12.weight"]


def test_cut_up_and_put_together():
    blocks = {f"blocks.{i}.w": torch.randn(2, 3) for i in range(4)} | {"b": torch.randn(2)}
    stored = put_together(blocks, ["blocks.0:3.w", "blocks.3.w", "b"])
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        "blocks.0:3.w": (3, 2, 3), "blocks.3.w": (2, 3), "b": (2,),
    }  # fmt: skip
    again = cut_up(stored)
    assert list(again) == list(blocks)
    assert all(torch.equal(again[name], t) for name, t in blocks.items())


def test_what_is_missing_of_a_row_is_named():
    with pytest.raises(KeyError, match=r"blocks\.1\.w"):
        put_together({"blocks.0.w": torch.zeros(1)}, ["blocks.0:2.w"])


def test_a_snapshot_is_cut_up_shard_by_shard():
    """Two shards of rows, of three stacked blocks."""
    whole = torch.arange(24.0).reshape(3, 4, 2)
    shards = tuple(HostShard(whole[:, at : at + 2], (0, at, 0)) for at in (2, 0))
    parts = cut_snapshot({"m/blocks.5:8.w": HostTensor((3, 4, 2), shards)})
    assert list(parts) == [f"m/blocks.{i}.w" for i in (5, 6, 7)]
    for block, part in zip(whole, parts.values(), strict=True):
        assert part.shape == (4, 2)
        assert [shard.offsets for shard in part.shards] == [(2, 0), (0, 0)]
        assert torch.equal(part.shards[0].data, block[2:])
        assert torch.equal(part.shards[1].data, block[:2])
