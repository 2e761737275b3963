"""Four processes over gloo: two copies of the state, each in two shards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_steps import start_backend, train_steps

pytestmark = pytest.mark.slow

COUNT = 4


@pytest.fixture(scope="module")
def alone():
    return train_steps(start_backend())


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    script = Path(__file__).parents[2] / "helpers" / "distributed_steps.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(COUNT), "2"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def test_names_and_shapes_do_not_change(several, alone):
    for one in several:
        assert one["names"] == alone["names"]
        assert one["shapes"] == alone["shapes"]


def test_every_process_holds_half_of_the_state(several, alone):
    for one in several:
        assert 0.5 <= one["bytes"] / alone["bytes"] < 0.53
    shards, full = several[0]["shards"], alone["shards"]
    proj, qkv, norm, bias = (
        f"blocks.2.{name}"
        for name in ("attn.proj.weight", "attn.qkv.weight", "norm1.weight", "mlp.w12.bias")
    )
    assert shards[proj] == (full[proj][0] // 2, full[proj][1])
    # The rules shard the columns, for TPUs; FSDP2 would copy such shards at every communication.
    assert shards[qkv] == (full[qkv][0] // 2, full[qkv][1])
    assert shards[norm] == full[norm]
    assert shards[bias] == full[bias]
    # five classes do not divide by two: the columns are sharded
    table = "y_embedder.embedding_table.weight"
    assert shards[table] == (full[table][0], full[table][1] // 2)


def test_losses_and_norms_are_those_of_the_global_batch(several, alone):
    """Including the discriminator, whose gradient is averaged over all processes."""
    for one in several:
        for ours, theirs in zip(one["norms"], alone["norms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
            assert ours[2] == 0


def test_weights_averages_and_moments_equal_those_of_one_process(several, alone):
    for name, full in alone["snapshot"].items():
        joined = torch.full(full.shape, torch.nan)
        for one in several:
            assert one["snapshot"][name].shape == full.shape
            for shard in one["snapshot"][name].shards:
                place = tuple(
                    slice(o, o + n) for o, n in zip(shard.offsets, shard.data.shape, strict=True)
                )
                assert joined[place].isnan().all(), "two processes write the same shard"
                joined[place] = shard.data
        torch.testing.assert_close(joined, full.shards[0].data, rtol=1e-4, atol=1e-6, msg=name)


def test_a_process_knows_what_it_will_hold_before_it_is_placed(several):
    for one in several:
        for name, part in one["own parts"].items():
            shard, full = one["shards"][name], one["shapes"][name]
            assert part.stop - part.start == shard[part.dimension] == full[part.dimension] // 2
        sharded = {n for n, shard in one["shards"].items() if shard != one["shapes"][n]}
        assert one["own parts"].keys() == sharded


def test_all_processes_skip_a_step_that_is_not_finite_on_one(several):
    assert [one["skipped"] for one in several] == [1.0] * COUNT


def test_rows_and_texts_are_gathered(several):
    for one in several:
        assert one["rows"]["row"].tolist() == list(range(8))
        assert one["rows"]["flags"].tolist() == [False] * 3 + [True] * 5
        assert one["rows"]["step"] == 5
        assert one["texts"] == [f"process {rank}" for rank in range(COUNT)]


def test_placing_again_changes_nothing(several):
    assert all(one["placed once"] for one in several)
