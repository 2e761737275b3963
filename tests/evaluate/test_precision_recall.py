"""Precision and recall equal torch-fidelity's and the published formula."""

import pytest
import torch
from evaluation_host import Host, on_hosts
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae_xla.errors import UserError
from rae_xla.evaluate import precision_recall as module
from rae_xla.evaluate.precision_recall import precision_recall


def features(count, seed, spread=1.0, size=16):
    return spread * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


REFERENCE, SAMPLES = features(230, 0), features(310, 1, spread=0.8)


def published_formula(reference, samples):
    """Compute eq. 1 and 2 of Kynkäänniemi et al. with all distances at once."""

    def covered_share(points, centres):
        """Return the share of ``points`` in a ball around one of ``centres``."""
        points, centres = points.double(), centres.double()
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()

    return covered_share(samples, reference), covered_share(reference, samples)


@pytest.mark.parametrize("blocks", [(1000, 8000), (100, 8000), (64, 50), (16, 70)])
def test_published_formula_with_any_block_size(monkeypatch, blocks):
    monkeypatch.setattr(module, "ROWS", blocks[0])
    monkeypatch.setattr(module, "COLUMNS", blocks[1])
    values = precision_recall(REFERENCE, SAMPLES, Host())
    assert values == pytest.approx(published_formula(REFERENCE, SAMPLES), abs=1e-12)
    assert 0.05 < values[1] < values[0] < 0.99  # narrow samples: high precision, low recall


def test_values_of_torch_fidelity():
    expected = calculate_precision_recall_full(SAMPLES, REFERENCE)  # generated set first
    assert precision_recall(REFERENCE, SAMPLES, Host()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work(monkeypatch, processes):
    monkeypatch.setattr(module, "ROWS", 50)
    expected = precision_recall(REFERENCE, SAMPLES, Host())
    rows = []

    def work(host):
        calls = []
        values = precision_recall(REFERENCE, SAMPLES, host, lambda: calls.append(1))
        rows.append(len(calls))
        return values

    assert on_hosts(processes, 1, work) == [expected] * processes
    assert sum(rows) == 5 + 7 + 7  # every row of blocks is computed by one process
    assert max(rows) < 19


def test_equal_and_distant_sets():
    assert precision_recall(REFERENCE, REFERENCE, Host()) == (1, 1)
    assert precision_recall(REFERENCE, REFERENCE + 100, Host()) == (0, 0)


def test_identical_images():
    """Balls of radius zero cover points at their centre."""
    same = REFERENCE[:1].expand(5, -1)
    assert precision_recall(same, same, Host()) == (1, 1)
    assert precision_recall(REFERENCE, same, Host()) == (1, pytest.approx(1 / 230))


def test_too_few_images():
    with pytest.raises(UserError, match=r"3 images in the samples.* 4 "):
        precision_recall(REFERENCE, SAMPLES[:3], Host())
