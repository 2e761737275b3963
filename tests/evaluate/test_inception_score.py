"""Inception Scores in both protocols equal those of the ADM suite and torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from rae_xla.evaluate.inception_score import ScoreStream, adm_splits, fidelity_splits


def logits(count, classes=30, seed=0):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def score(rows, split_of, size=100):
    stream = ScoreStream(split_of)
    for part in rows.split(size):
        stream.add(part)
    return stream.score()


def adm_score(rows, split_size=5000):
    """Compute the formula of the ADM suite without streaming."""
    p = torch.softmax(rows.double(), 1).numpy()
    scores = []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores))


@pytest.mark.parametrize("count", [7, 5000, 12_345])
def test_score_of_the_adm_suite(count):
    rows = logits(count)
    rows[count // 2 :] += 2 * logits(1, seed=1)  # the splits differ
    assert score(rows, adm_splits(count)) == pytest.approx(adm_score(rows), rel=1e-10)


@pytest.mark.parametrize("count", [10, 23, 4000])
def test_score_of_torch_fidelity(count):
    rows = logits(count)
    expected = isc_features_to_metric(rows, splits=10, shuffle=True, rng_seed=2020)
    computed = score(rows, fidelity_splits(count))
    assert computed == pytest.approx(expected["inception_score_mean"], rel=1e-10)


def test_known_scores():
    certain = torch.full((20, 4), -1e4)
    certain[torch.arange(20), torch.arange(20) % 4] = 0  # four equally frequent classes
    assert score(certain, adm_splits(20)) == pytest.approx(4)
    assert score(torch.zeros(20, 4), adm_splits(20)) == pytest.approx(1)


def test_scores_are_bit_identical_for_any_parts():
    rows = logits(1000)
    for splits in (adm_splits, fidelity_splits):
        assert len({score(rows, splits(1000), size) for size in (1, 7, 64, 1000)}) == 1
