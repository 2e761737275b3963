"""Moments of latents do not depend on batching."""

import torch

from rae_xla.evaluate.latent_statistics import Moments


def moments(samples):
    return Moments(len(samples), samples.mean(0), ((samples - samples.mean(0)) ** 2).sum(0))


def test_merged_moments_far_from_zero():
    # a fixed seed: with one seed in eight, the error of float64 itself reaches 1e-9
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1000, 5, dtype=torch.float64, generator=generator) * 1e-3 + 1e4
    merged = None
    for part in samples.split([1, 499, 7, 493]):
        merged = moments(part) if merged is None else merged.merge(moments(part))
    torch.testing.assert_close(merged.mean, samples.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.variance, samples.var(0, unbiased=False), rtol=1e-9, atol=0)


def test_merging_an_empty_part():
    samples = torch.randn(4, 3, dtype=torch.float64)
    empty = Moments(0.0, torch.zeros(3).double(), torch.zeros(3).double())
    torch.testing.assert_close(moments(samples).merge(empty).variance, moments(samples).variance)
    torch.testing.assert_close(empty.merge(moments(samples)).mean, moments(samples).mean)
