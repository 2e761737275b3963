"""Moments that do not depend on how the samples came."""

import torch

from rae_xla.evaluate.latent_statistics import Moments


def moments(samples):
    return Moments(len(samples), samples.mean(0), ((samples - samples.mean(0)) ** 2).sum(0))


def test_merging_equals_measuring_at_once_far_from_zero():
    # a seed of its own: of one sample in eight, float64 itself is 1e-9 off here
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1000, 5, dtype=torch.float64, generator=generator) * 1e-3 + 1e4
    merged = None
    for part in samples.split([1, 499, 7, 493]):
        merged = moments(part) if merged is None else merged.merge(moments(part))
    torch.testing.assert_close(merged.mean, samples.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.variance, samples.var(0, unbiased=False), rtol=1e-9, atol=0)


def test_an_empty_part_changes_nothing():
    samples = torch.randn(4, 3, dtype=torch.float64)
    nothing = Moments(0.0, torch.zeros(3).double(), torch.zeros(3).double())
    torch.testing.assert_close(moments(samples).merge(nothing).variance, moments(samples).variance)
    torch.testing.assert_close(nothing.merge(moments(samples)).mean, moments(samples).mean)
