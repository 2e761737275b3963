"""Sampling: generate, reconstruct and write images with trained models."""
