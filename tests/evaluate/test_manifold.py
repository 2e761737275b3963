"""Precision and recall against torch-fidelity's and against the formula."""

import pytest
import torch
from evaluation_host import Host, on_hosts
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae_xla.errors import UserError
from rae_xla.evaluate import manifold
from rae_xla.evaluate.manifold import precision_recall


def features(count, seed, spread=1.0, size=16):
    return spread * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


REFERENCE, SAMPLES = features(230, 0), features(310, 1, spread=0.8)


def by_hand(reference, samples):
    """Kynkäänniemi et al., eq. 1 and 2, with all distances at once."""

    def covers(these, those):
        """Whether each of ``those`` lies in a ball of ``these``."""
        these, those = these.double(), those.double()
        radii = torch.cdist(these, these).sort(1).values[:, 3]
        return (torch.cdist(those, these) <= radii).any(1).double().mean().item()

    return covers(reference, samples), covers(samples, reference)


@pytest.mark.parametrize("blocks", [(1000, 8000), (100, 8000), (64, 50), (16, 70)])
def test_the_formula_whatever_the_blocks(monkeypatch, blocks):
    monkeypatch.setattr(manifold, "ROWS", blocks[0])
    monkeypatch.setattr(manifold, "COLUMNS", blocks[1])
    found = precision_recall(REFERENCE, SAMPLES, Host())
    assert found == pytest.approx(by_hand(REFERENCE, SAMPLES), abs=1e-12)
    assert 0.05 < found[1] < found[0] < 0.99  # narrow: precise, and much is missing


def test_torch_fidelitys_numbers():
    expected = calculate_precision_recall_full(SAMPLES, REFERENCE)  # its first set is generated
    assert precision_recall(REFERENCE, SAMPLES, Host()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(monkeypatch, processes):
    monkeypatch.setattr(manifold, "ROWS", 50)
    expected = precision_recall(REFERENCE, SAMPLES, Host())
    rows = []

    def work(host):
        moves = []
        found = precision_recall(REFERENCE, SAMPLES, host, lambda: moves.append(1))
        rows.append(len(moves))
        return found

    assert on_hosts(processes, 1, work) == [expected] * processes
    assert sum(rows) == 5 + 7 + 7  # rows of blocks, each in one process
    assert max(rows) < 19


def test_sets_that_are_equal_or_far_apart():
    assert precision_recall(REFERENCE, REFERENCE, Host()) == (1, 1)
    assert precision_recall(REFERENCE, REFERENCE + 100, Host()) == (0, 0)


def test_pictures_that_are_all_the_same():
    """Balls of no size cover what lies exactly there."""
    same = REFERENCE[:1].expand(5, -1)
    assert precision_recall(same, same, Host()) == (1, 1)
    assert precision_recall(REFERENCE, same, Host()) == (1, pytest.approx(1 / 230))


def test_too_few_pictures():
    with pytest.raises(UserError, match=r"3 pictures in the samples: .* 4 are needed"):
        precision_recall(REFERENCE, SAMPLES[:3], Host())
