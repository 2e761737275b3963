"""Four real processes with gloo between them: two copies of a state, each in two parts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from work_of_processes import start_runtime, work

from rae_xla.errors import UserError
from rae_xla.runtime.launch import Launch, read_launch

pytestmark = pytest.mark.unhurried

COUNT = 4


@pytest.fixture(scope="module")
def alone():
    return work(start_runtime())


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    script = Path(__file__).parents[1] / "work_of_processes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(COUNT), "2"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def test_names_and_shapes_stay_as_published(several, alone):
    for one in several:
        assert one["names"] == alone["names"]
        assert one["shapes"] == alone["shapes"]


def test_every_process_holds_its_part_of_the_state(several, alone):
    for one in several:
        assert 0.5 <= one["bytes"] / alone["bytes"] < 0.53
    split, whole = several[0]["split"], alone["split"]
    proj, qkv, norm, bias = (
        f"blocks.2.{name}"
        for name in ("attn.proj.weight", "attn.qkv.weight", "norm1.weight", "mlp.w12.bias")
    )
    assert split[proj] == (whole[proj][0] // 2, whole[proj][1])
    assert split[qkv] == (whole[qkv][0], whole[qkv][1] // 2)
    assert split[norm] == whole[norm]
    assert split[bias] == whole[bias]
    # five classes do not divide by two: its columns are split
    table = "y_embedder.embedding_table.weight"
    assert split[table] == (whole[table][0], whole[table][1] // 2)


def test_losses_and_norms_are_those_of_the_whole_batch(several, alone):
    """Of the discriminator too: its gradient is every process's, not its own rows'."""
    for one in several:
        for ours, theirs in zip(one["norms"], alone["norms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
            assert ours[2] == 0


def test_weights_averages_and_moments_become_those_of_one_process(several, alone):
    for name, whole in alone["snapshot"].items():
        made = torch.full(whole.shape, torch.nan)
        for one in several:
            assert one["snapshot"][name].shape == whole.shape
            for shard in one["snapshot"][name].shards:
                place = tuple(
                    slice(o, o + n) for o, n in zip(shard.offsets, shard.data.shape, strict=True)
                )
                assert made[place].isnan().all(), "two processes write the same"
                made[place] = shard.data
        torch.testing.assert_close(made, whole.shards[0].data, rtol=1e-4, atol=1e-6, msg=name)


def test_all_skip_a_step_that_one_process_finds_broken(several):
    assert [one["skipped"] for one in several] == [1.0] * COUNT


def test_rows_come_together_and_words_are_passed(several):
    for one in several:
        assert one["rows"]["row"].tolist() == list(range(8))
        assert one["rows"]["flags"].tolist() == [False] * 3 + [True] * 5
        assert one["rows"]["step"] == 5
        assert one["said"] == [f"process {rank}" for rank in range(COUNT)]


def test_what_is_placed_stays_as_it_is(several):
    assert all(one["placed once"] for one in several)


def test_a_process_without_a_launcher_is_alone():
    assert read_launch({}) == read_launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()


def test_what_torchrun_says():
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    address = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert read_launch(said | address) == Launch(index=5, count=8, local_index=1)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 8.*MASTER_ADDR is not set.*torchrun"):
        read_launch(said)
    with pytest.raises(UserError, match="RANK is no number"):
        read_launch(said | address | {"RANK": "first"})
