"""Counter-based random numbers: published test vectors, statistics, independence of the batch."""

import zlib

import pytest
import torch

from rae_xla.ops import random
from rae_xla.ops.random import CounterRNG, _int32, _purpose_id, threefry

# Test vectors of Threefry-2x32 with 20 rounds, from the Random123 distribution of its authors.
TEST_VECTORS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "expected"), TEST_VECTORS)
def test_threefry_matches_published_test_vectors(key, counter, expected):
    key = tuple(_int32(half) for half in key)
    counts = tuple(torch.tensor([_int32(c)], dtype=torch.int32) for c in counter)
    assert [int(bits) & 0xFFFFFFFF for bits in threefry(key, counts)] == list(expected)


def rng(rows, step=3, seed=11):
    return CounterRNG(seed, torch.tensor(step, dtype=torch.int32), torch.as_tensor(rows).int())


def test_row_is_independent_of_other_rows_in_batch():
    batch = rng(range(8)).normal("noise", (3, 4, 5))
    part = rng([5, 2]).normal("noise", (3, 4, 5))
    torch.testing.assert_close(part, batch[[5, 2]], rtol=0, atol=0)


def test_seed_step_purpose_and_row_change_the_numbers():
    base = rng([0, 1]).uniform("time", (64,))
    others = [
        rng([0, 1], seed=12).uniform("time", (64,)),
        rng([0, 1], seed=11 + (1 << 32)).uniform("time", (64,)),
        rng([0, 1], step=4).uniform("time", (64,)),
        rng([0, 1]).uniform("label", (64,)),
        rng([2, 3]).uniform("time", (64,)),
    ]
    for other in others:
        assert not torch.isin(other, base).any()


@pytest.mark.parametrize("purpose", ["", "time", "label dropout", "\xe9\u2192"])
def test_purpose_id_is_the_crc32_of_its_text(purpose):
    """Any other hash would change every random number of a resumed run."""
    assert _purpose_id(purpose) == zlib.crc32(purpose.encode())


def test_distributions_are_uniform_and_normal():
    uniform = rng(range(200)).uniform("u", (1000,)).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = torch.histc(uniform, bins=100, min=0, max=1)
    # chi-squared with 99 degrees of freedom: mean 99, standard deviation 14
    assert (((counts - 2000) ** 2) / 2000).sum() < 99 + 5 * 14
    normal = rng(range(200)).normal("n", (1001,)).double()
    n = normal.numel()
    assert abs(normal.mean()) < 5 / n**0.5
    assert abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / n) ** 0.5
    pairs = torch.corrcoef(normal[:, :1000].reshape(-1, 2).T)
    assert abs(pairs[0, 1]) < 5 / (n / 2) ** 0.5


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(3, ()), (8, (3, 32, 32)), (3, (5, 7)), (2, (40001,)), (40000, (3,))],
    ids=["scalars", "even", "odd", "columns of several blocks", "rows of several blocks"],
)
def test_numbers_in_place_and_in_blocks_are_those_of_a_compiled_graph(monkeypatch, rows, shape):
    """Bit by bit: a compiled run and an eager one draw the same."""
    draws = rng(torch.arange(rows) * 7 - 5, seed=11 + (5 << 32))
    in_place = draws.normal("n", shape), draws.uniform("u", shape)
    monkeypatch.setattr(random, "runs_eagerly", lambda device: False)
    traced = draws.normal("n", shape), draws.uniform("u", shape)
    for ours, theirs in zip(in_place, traced, strict=True):
        assert torch.equal(ours, theirs)


def test_several_purposes_at_once_are_those_of_each(monkeypatch):
    draws = rng([5, 0, 3])
    together = draws.uniforms("label dropout", "time", "x")
    monkeypatch.setattr(random, "runs_eagerly", lambda device: False)
    for traced in (
        draws.uniforms("label dropout", "time", "x"),
        map(draws.uniform, ("label dropout", "time", "x")),
    ):
        for ours, theirs in zip(together, traced, strict=True):
            assert torch.equal(ours, theirs)
